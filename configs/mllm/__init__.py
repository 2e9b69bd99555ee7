"""Configs shipped with the package: mllm runs."""
