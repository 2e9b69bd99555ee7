"""The HTTP server behind `unitok serve`: OpenAI's shapes in front, batches of one model behind."""
