"""`unitok convert ...`: published checkpoints, LoRA adapters, bf16."""
