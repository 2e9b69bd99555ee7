"""The decoder over text tokens and image codes: one sequence, a visual embedder and a depth head."""
