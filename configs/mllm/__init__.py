"""Configs shipped with the package: stage 2, the MLLM at the published size."""
