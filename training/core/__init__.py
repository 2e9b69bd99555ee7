"""Shared by all training stages: DeepSpeed engine, checkpoints, config, logging."""
