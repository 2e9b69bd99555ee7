"""Answers that other programs wrote: their file formats, and their scores."""
