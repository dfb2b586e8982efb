"""From prompts to tokens and text."""
