"""Pixel decoders: tokens to pixels. A new one is one file and one entry of `DECODERS`.

An entry builds a module from the config. The module has `patch_size`, `width` and `last_weight` (the last
layer's weight, for the adaptive GAN weight), and maps (B, N, width) tokens, registers first, and their grid
(rows, columns) to (B, 3, rows*patch_size, columns*patch_size) pixels, not clamped. Where it has `tokens`, N
is that number (`token_layout.tokens`).
"""

from collections.abc import Callable
from typing import Any

from ..config import UniTokConfig
from ..entries import build_entry
from ..vqgan.decoder import VQGANDecoder
from .autoencoder_kl import AutoencoderKLDecoder
from .gaussian import GaussianDecoder
from .resampled import ResampledDecoder
from .vit import ViTDecoder
from .vitamin import ViTaminDecoder

DECODERS: dict[str, Callable[[UniTokConfig], Any]] = {
    "vitamin": ViTaminDecoder,
    "vqgan": VQGANDecoder,
    "vit": ViTDecoder,
    "gaussian": lambda config: GaussianDecoder(config, build_decoder),
    "resampled": lambda config: ResampledDecoder(config, build_decoder),
    "autoencoder_kl": AutoencoderKLDecoder,
}


def build_decoder(config: UniTokConfig) -> Any:
    """Build the decoder `config.decoder`.

    Raises:
        UserError: there is no such decoder, or its patch size differs from the config's.
    """
    return build_entry(DECODERS, "DECODERS", "decoder", config)


__all__ = [
    "DECODERS",
    "AutoencoderKLDecoder",
    "GaussianDecoder",
    "ResampledDecoder",
    "VQGANDecoder",
    "ViTDecoder",
    "ViTaminDecoder",
    "build_decoder",
]
