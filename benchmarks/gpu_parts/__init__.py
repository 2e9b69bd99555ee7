"""Parts of benchmarks/gpu.py: each module has `run(report)` and runs in a process of its own."""
