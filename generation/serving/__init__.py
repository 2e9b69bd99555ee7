"""The HTTP server of `unitok serve`: OpenAI-compatible routes, dynamic batching, one model."""
