"""Pixel decoders: tokens to pixels. A new one is one file and one entry of `DECODERS`.

An entry builds a module from the config. The module has `patch_size`, `width` and `last_weight` (the last
layer's weight, for the adaptive GAN weight), and maps (B, N, width) tokens, registers first, and their grid
(rows, columns) to (B, 3, rows*patch_size, columns*patch_size) pixels, not clamped.
"""

from collections.abc import Callable
from typing import Any

from ..config import UniTokConfig
from ..entries import build_entry
from .vitamin import ViTaminDecoder

DECODERS: dict[str, Callable[[UniTokConfig], Any]] = {
    "vitamin": ViTaminDecoder,
}


def build_decoder(config: UniTokConfig) -> Any:
    """Build the decoder `config.decoder`.

    Raises:
        UserError: there is no such decoder, or its patch size differs from the config's.
    """
    return build_entry(DECODERS, "DECODERS", "decoder", config)


__all__ = ["DECODERS", "ViTaminDecoder", "build_decoder"]
