"""A video tokenizer with separate tokens of appearance and of motion: SweetTok (arXiv 2412.10443)."""

from .config import VideoTokenizerConfig
from .model import VideoCodes, VideoTokenizer, VideoTokenizerOutput

__all__ = ["VideoCodes", "VideoTokenizer", "VideoTokenizerConfig", "VideoTokenizerOutput"]
