"""Benchmarks of the visual tokenizer: reconstruction, zero-shot, linear probe, retrieval."""
