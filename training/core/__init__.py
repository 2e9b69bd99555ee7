"""The training engine and what every stage shares: DeepSpeed, checkpoints, config, logging."""
