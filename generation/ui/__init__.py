"""The Gradio page of `unitok ui`."""
