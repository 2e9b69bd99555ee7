"""Rows of the study with another encoder, decoder or kind of token than the base."""
