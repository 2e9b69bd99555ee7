"""The Gradio page behind `unitok ui`."""
