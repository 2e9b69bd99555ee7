"""Stage 1: training of the visual tokenizer (arXiv 2502.20321, section 3.1)."""
