"""Benchmarks that ask questions about images."""
