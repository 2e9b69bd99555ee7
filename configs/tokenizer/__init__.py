"""Configs shipped with the package: tokenizer runs."""
