"""What build takes, gives back, reports and refuses."""
