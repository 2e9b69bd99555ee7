"""Trained continuous autoencoders as the base of a discrete tokenizer, and LoRA on their layers (CODA)."""
