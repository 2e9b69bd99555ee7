"""Class-conditional image generation on a tokenizer's codes (LlamaGen, arXiv 2406.06525)."""

from .config import CLASS_CONDITIONAL_SIZES, ClassConditionalConfig
from .model import ClassConditionalModel

__all__ = ["CLASS_CONDITIONAL_SIZES", "ClassConditionalConfig", "ClassConditionalModel"]
