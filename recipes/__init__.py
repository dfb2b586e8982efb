"""What people run: functions that return configurations, and thin scripts around the trainer."""
