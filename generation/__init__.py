"""Image and text generation: sampling, KV caches, streaming, and the Pipeline around them."""

from .image_sampling import draw_codes, draw_steps
from .pipeline import Pipeline
from .sampling import Sampling, filter_logits
from .text_generation import answer_ids, answer_steps

__all__ = ["Pipeline", "Sampling", "answer_ids", "answer_steps", "draw_codes", "draw_steps", "filter_logits"]
