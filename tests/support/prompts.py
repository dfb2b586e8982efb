"""Prompts for the tiny model, and how to go on from them."""

PROMPTS = [[5, 6, 7], [100], [200, 3, 44, 250, 17, 99, 3, 3, 12], list(range(40, 110))]
TEXTS = ["the quick brown fox", "dozen", "pack my box with five"]
ON = {"stop_token_ids": (), "temperature": 0.0}
"""Greedy, to the end."""
