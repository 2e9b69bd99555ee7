"""Image and text generation: sampling, KV caches, streaming, and `Pipeline`, which combines them."""

from .image_sampling import generate_image_codes, iter_image_codes
from .pipeline import Pipeline
from .sampling import Sampling, filter_logits
from .text_generation import generate_text_ids, iter_text_ids

__all__ = [
    "Pipeline",
    "Sampling",
    "filter_logits",
    "generate_image_codes",
    "generate_text_ids",
    "iter_image_codes",
    "iter_text_ids",
]
