"""Encoders: pixels to tokens. A new one is one file and one entry of `ENCODERS`.

An entry builds a module from the config. The module has `patch_size` and `width`, and maps (B, 3, H, W)
pixels in [-1, 1] to (B, N, width) tokens: `config.num_register_tokens` registers, then the grid in raster
order.
"""

from collections.abc import Callable
from typing import Any

from open_unitok.core.errors import UserError

from ..config import UniTokConfig, entry_of
from .hf_vision import HFVisionEncoder
from .vitamin import ViTaminEncoder

ENCODERS: dict[str, Callable[[UniTokConfig], Any]] = {
    "vitamin": ViTaminEncoder,
    "hf_vision": HFVisionEncoder,
}


def build_encoder(config: UniTokConfig) -> Any:
    """Build the encoder `config.encoder`.

    Raises:
        UserError: there is no such encoder, or its patch size differs from the config's.
    """
    encoder = entry_of(ENCODERS, "ENCODERS", "encoder", config.encoder)(config)
    if encoder.patch_size != config.patch_size:
        raise UserError(
            f"encoder {config.encoder!r} has patches of {encoder.patch_size} pixels, but patch_size = "
            f"{config.patch_size}: they must be equal."
        )
    return encoder


__all__ = ["ENCODERS", "HFVisionEncoder", "ViTaminEncoder", "build_encoder"]
