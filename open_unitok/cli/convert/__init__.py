"""`unitok convert ...`: published weights to ours, adapters, bf16."""
