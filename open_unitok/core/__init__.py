"""Errors, files, devices and ranks. Imports nothing of ours; every package may import it."""
