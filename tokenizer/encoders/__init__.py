"""Encoders: pixels to tokens. A new one is one file and one entry of `ENCODERS`.

An entry builds a module from the config. The module has `patch_size` and `width`, and maps (B, 3, H, W)
pixels in [-1, 1] to (B, N, width) tokens: `config.num_register_tokens` registers, then the grid in raster
order; or, where it has `tokens`, that many of an image (`token_layout.tokens`).
"""

from collections.abc import Callable
from typing import Any

from ..config import UniTokConfig
from ..entries import build_entry
from .hf_vision import HFVisionEncoder
from .resampled import ResampledEncoder
from .vitamin import ViTaminEncoder

ENCODERS: dict[str, Callable[[UniTokConfig], Any]] = {
    "vitamin": ViTaminEncoder,
    "hf_vision": HFVisionEncoder,
    "resampled": lambda config: ResampledEncoder(config, build_encoder),
}


def build_encoder(config: UniTokConfig) -> Any:
    """Build the encoder `config.encoder`.

    Raises:
        UserError: there is no such encoder, or its patch size differs from the config's.
    """
    return build_entry(ENCODERS, "ENCODERS", "encoder", config)


__all__ = ["ENCODERS", "HFVisionEncoder", "ResampledEncoder", "ViTaminEncoder", "build_encoder"]
