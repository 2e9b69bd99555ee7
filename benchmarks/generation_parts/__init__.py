"""Parts of benchmarks/generation.py: models, peers, baselines, tables."""
