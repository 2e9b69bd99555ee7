"""Configs shipped with the package: stage 1, the visual tokenizer."""
