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
from ..entries import build_entry, inner_config
from ..vqgan.encoder import VQGANEncoder
from .autoencoder_kl import AutoencoderKLEncoder
from .dual import DualEncoder, dual_configs
from .gaussian import GAUSSIAN_OPTIONS, GaussianEncoder
from .hf_vision import HFVisionEncoder
from .resampled import QUERY_OPTIONS, ResampledEncoder
from .vitamin import ViTaminEncoder

ENCODERS: dict[str, Callable[[UniTokConfig], Any]] = {
    "vitamin": ViTaminEncoder,
    "hf_vision": HFVisionEncoder,
    "vqgan": VQGANEncoder,
    "gaussian": lambda config: GaussianEncoder(config, build_encoder),
    "resampled": lambda config: ResampledEncoder(config, build_encoder),
    "dual": lambda config: DualEncoder(config, build_encoder),
    "autoencoder_kl": AutoencoderKLEncoder,
}

# entries with the options of an `inner` encoder beside their own: these, and the inner entry by default
WRAPPERS = {"resampled": (QUERY_OPTIONS, "vitamin"), "gaussian": (GAUSSIAN_OPTIONS, "vqgan")}


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
    options, paths = _resolve_options(config)
    if not paths:
        return config, {}
    config = copy.deepcopy(config)
    config.encoder_options = options
    return config, paths


def _resolve_options(config: UniTokConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """`encoder_options` and paths, see `resolve_paths`; of the encoders inside of others, too."""
    options, paths = dict(config.encoder_options or {}), {}
    if config.encoder == "hf_vision":
        return HFVisionEncoder.resolve(config)
    if config.encoder in WRAPPERS:
        own_options, default = WRAPPERS[config.encoder]
        inner, found = _resolve_options(inner_config(config, "encoder", own_options, default))
        own = {name: options[name] for name in options if name in ("encoder", *own_options)}
        return {**own, **inner}, {_join("inner", name): path for name, path in found.items()}
    if config.encoder == "dual":
        for part, inner in dual_configs(config).items():
            fields, found = _resolve_options(inner)
            own = {name: options[part][name] for name in ("encoder", "projection") if name in options[part]}
            options[part] = {**own, **fields}
            paths |= {_join(part, name): path for name, path in found.items()}
    return options, paths


def _join(outer: str, inner: str) -> str:
    return f"{outer}.{inner}" if inner else outer


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
    "GaussianEncoder",
    "HFVisionEncoder",
    "ResampledEncoder",
    "VQGANEncoder",
    "ViTaminEncoder",
    "build_encoder",
    "load_towers",
    "resolve_paths",
]
