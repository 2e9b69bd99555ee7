"""Emoji: whether the nearest original of a generated image is the prompt's emoji, and in its style."""

from ..judges.emoji_originals import answer, score
from ..judges.emoji_originals import load_generated as load

__all__ = ["answer", "load", "score"]
