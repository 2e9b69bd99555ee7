"""Studies: rows of configs trained on the same data with the same budget, measured alike, in one table."""
