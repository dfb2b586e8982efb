"""build(), checkpoints, the latent cache, generation and the trainer."""
