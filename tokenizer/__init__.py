"""The visual tokenizer: image <-> codes, and CLIP-style image/text embeddings (UniTok, arXiv 2502.20321, section 3)."""
