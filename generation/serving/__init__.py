"""The HTTP server behind `unitok serve`: OpenAI-compatible routes, dynamic batching, one model."""
