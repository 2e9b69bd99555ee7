"""Encoders: pixels to tokens. A new one is one file and one entry of `ENCODERS`.

An entry builds a module from the config. The module has `patch_size` and `width`, and maps (B, 3, H, W)
pixels in [-1, 1] to (B, N, width) tokens: `config.num_register_tokens` registers, then the grid in raster
order; or, where it has `tokens`, that many of an image (`token_layout.tokens`).
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..config import UniTokConfig
from ..entries import build_entry
from ..vqgan.encoder import VQGANEncoder
from .autoencoder_kl import AutoencoderKLEncoder
from .hf_vision import HFVisionEncoder
from .resampled import ResampledEncoder
from .vitamin import ViTaminEncoder

ENCODERS: dict[str, Callable[[UniTokConfig], Any]] = {
    "vitamin": ViTaminEncoder,
    "hf_vision": HFVisionEncoder,
    "vqgan": VQGANEncoder,
    "resampled": lambda config: ResampledEncoder(config, build_encoder),
    "autoencoder_kl": AutoencoderKLEncoder,
}


def build_encoder(config: UniTokConfig) -> Any:
    """Build the encoder `config.encoder`.

    Raises:
        UserError: there is no such encoder, or its patch size differs from the config's.
    """
    return build_entry(ENCODERS, "ENCODERS", "encoder", config)


def resolve_paths(config: UniTokConfig) -> tuple[UniTokConfig, dict[str, str]]:
    """The config with the fields of each tower that `encoder_options` names by path in place of the path; the
    paths, by submodule of the encoder.

    Raises:
        UserError: a path holds no vision tower.
    """
    resolve = getattr(ENCODERS.get(config.encoder), "resolve", None)
    options, paths = resolve(config) if resolve else ({}, {})
    if not paths:
        return config, {}
    config = copy.deepcopy(config)
    config.encoder_options = options
    return config, paths


def load_towers(encoder: Any, paths: Mapping[str, str]) -> None:
    """Load the weights of the towers at `paths`, of `resolve_paths`; on the meta device there are none.

    Raises:
        UserError: they are missing or broken.
    """
    if not torch.empty(0).is_meta:
        for part, path in paths.items():
            encoder.get_submodule(part).load_weights(path)


__all__ = [
    "ENCODERS",
    "AutoencoderKLEncoder",
    "HFVisionEncoder",
    "ResampledEncoder",
    "VQGANEncoder",
    "ViTaminEncoder",
    "build_encoder",
    "load_towers",
    "resolve_paths",
]
