"""Errors, files and ranks: what every package may import; imports nothing of ours."""
