"""Benchmarks that score generated images."""
