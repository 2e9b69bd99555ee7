"""Rows of the study with another quantiser than the base."""
