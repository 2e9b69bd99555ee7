"""Quantisers: latents to codes and back. A new one is one file and one entry of `QUANTIZERS`."""

from typing import Any

import torch

from open_unitok.core.codes import code_dtype
from open_unitok.core.errors import UserError

from ..config import UniTokConfig
from ..entries import entry_of
from .attention import AttentionQuantizer
from .base import Quantizer, QuantizerOutput
from .cluster import ClusterQuantizer
from .ema import EMAQuantizer
from .gaussian import GaussianQuantizer
from .ibq import IBQQuantizer
from .language import LanguageMapQuantizer, LanguageQuantizer
from .library import LibraryQuantizer
from .multi_codebook import MultiCodebookQuantizer
from .nearest import NearestQuantizer
from .nearest_ema import NearestEMAQuantizer
from .none import NoQuantizer
from .options import check_quantizer_options
from .residual import ResidualQuantizer
from .shared_index import SharedIndexQuantizer

QUANTIZERS: dict[str, type[Quantizer]] = {
    "multi_codebook": MultiCodebookQuantizer,
    "nearest": NearestQuantizer,
    "nearest_ema": NearestEMAQuantizer,
    "ibq": IBQQuantizer,
    "ema": EMAQuantizer,
    "cluster": ClusterQuantizer,
    "shared_index": SharedIndexQuantizer,
    "attention": AttentionQuantizer,
    "residual": ResidualQuantizer,
    "language": LanguageQuantizer,
    "language_map": LanguageMapQuantizer,
    "library": LibraryQuantizer,
    "none": NoQuantizer,
    "gaussian": GaussianQuantizer,
}
# a pyramid takes any of the others on a grid
ResidualQuantizer.inner_kinds = {name: kind for name, kind in QUANTIZERS.items() if name != "gaussian"}
# neither wrappers nor kinds whose rows come from a list of words
GaussianQuantizer.inner_kinds = {
    name: kind
    for name, kind in QUANTIZERS.items()
    if name not in ("residual", "gaussian", "language", "language_map", "none")
}


def build_quantizer(config: UniTokConfig) -> Quantizer:
    """Build the quantiser `config.quantizer` with its `quantizer_options`.

    Raises:
        UserError: there is no such quantiser, it has no such option, or its sizes are not the config's.
    """
    kind = entry_of(QUANTIZERS, "QUANTIZERS", "quantizer", config.quantizer)
    check_quantizer_options("quantizer", config.quantizer, kind, config.quantizer_options)
    options = config.quantizer_options or {}
    build: Any = kind  # subclasses have another constructor than the base class
    quantizer = build(config.num_codebooks, config.codebook_size, config.codebook_dim, **options)
    _check_sizes(config, quantizer)
    return quantizer


def describe_quantizer(config: UniTokConfig) -> Quantizer:
    """As `build_quantizer`, without memory for its tensors: to read its attributes."""
    with torch.device("meta"):
        return build_quantizer(config)


def _check_sizes(config: UniTokConfig, quantizer: Quantizer) -> None:
    """Code shards, MLLM config and pipeline read N, K and V from the config: the quantiser must agree."""
    if not quantizer.discrete:
        return
    sizes = quantizer.code_sizes
    for name, ours, call, theirs in (
        ("num_visual_tokens", config.num_visual_tokens, "num_tokens", quantizer.num_tokens(config.layout)),
        ("num_codebooks", config.num_codebooks, "code_sizes, length", len(sizes)),
        ("codebook_size", config.codebook_size, "code_sizes, maximum", max(sizes, default=0)),
    ):
        if ours != theirs:
            raise UserError(
                f"{name} = {ours} in the config, but {theirs} in quantizer = {config.quantizer!r} "
                f"(Quantizer.{call}): they must be equal."
            )


__all__ = [
    "QUANTIZERS",
    "AttentionQuantizer",
    "ClusterQuantizer",
    "EMAQuantizer",
    "GaussianQuantizer",
    "IBQQuantizer",
    "LanguageMapQuantizer",
    "LanguageQuantizer",
    "LibraryQuantizer",
    "MultiCodebookQuantizer",
    "NearestEMAQuantizer",
    "NearestQuantizer",
    "NoQuantizer",
    "Quantizer",
    "QuantizerOutput",
    "ResidualQuantizer",
    "SharedIndexQuantizer",
    "build_quantizer",
    "code_dtype",
    "describe_quantizer",
]
