"""Stage 2: training of the unified MLLM (arXiv 2502.20321, section 3.4)."""
