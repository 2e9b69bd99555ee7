"""Rows of the study that compare what an MLLM does with a tokenizer."""
