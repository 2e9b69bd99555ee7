"""Benchmarks: loaders, scorers and the resumable harness."""
