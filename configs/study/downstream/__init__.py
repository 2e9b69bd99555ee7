"""Tokenizers on scenes, and what is trained on their codes, in the downstream study."""
