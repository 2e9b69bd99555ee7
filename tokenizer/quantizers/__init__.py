"""Quantisers: latents to codes and back. A new one is one file and one entry of `QUANTIZERS`."""

import inspect
from typing import Any

from open_unitok.core.codes import code_dtype

from ..config import UniTokConfig, check_options, entry_of
from .base import Quantizer, QuantizerOutput
from .multi_codebook import MultiCodebookQuantizer
from .nearest import NearestQuantizer

QUANTIZERS: dict[str, type[Quantizer]] = {
    "multi_codebook": MultiCodebookQuantizer,
    "nearest": NearestQuantizer,
}


def build_quantizer(config: UniTokConfig) -> Quantizer:
    """Build the quantiser `config.quantizer` with its `quantizer_options`.

    Raises:
        UserError: there is no such quantiser, or it has no such option.
    """
    kind = entry_of(QUANTIZERS, "QUANTIZERS", "quantizer", config.quantizer)
    options = config.quantizer_options or {}
    allowed = list(inspect.signature(kind).parameters)[3:]  # the first three are the sizes
    check_options("quantizer", config.quantizer, options, allowed)
    build: Any = kind  # subclasses have another constructor than the base class
    return build(config.num_codebooks, config.codebook_size, config.codebook_dim, **options)


__all__ = [
    "QUANTIZERS",
    "MultiCodebookQuantizer",
    "NearestQuantizer",
    "Quantizer",
    "QuantizerOutput",
    "build_quantizer",
    "code_dtype",
]
