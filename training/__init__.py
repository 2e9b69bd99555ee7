"""The two training stages, their data, losses and checkpoints."""
