"""Rows of the tokenizer study: each inherits from base.yaml and says what differs."""
