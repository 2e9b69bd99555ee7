"""Sampling: text-to-image, answers, and the Pipeline that joins tokenizer and MLLM."""
