"""Emoji: whether the nearest original of a reconstruction is the image's emoji, and in its style."""

from ..judges.emoji_originals import answer, score
from ..judges.emoji_originals import load_reconstructions as load

__all__ = ["answer", "load", "score"]
