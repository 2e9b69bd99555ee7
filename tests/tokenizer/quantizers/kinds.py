"""How the tests of all quantisers build each entry: options, and what training leaves alone.

The tokenizers have 2 x 2 visual tokens, so a pyramid has the scales 1 and 2.
"""

import json
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest

from open_unitok.tokenizer import QUANTIZERS


class Kind(NamedTuple):
    """An entry of QUANTIZERS in the tests; entries that are not listed have the defaults."""

    options: dict[str, Any] = {}  # quantizer_options
    model: dict[str, Any] = {}  # further fields of UniTokConfig
    entropy: bool = False  # whether there is an entropy loss
    codebooks: dict[str, Any] = {}  # that section of runs on several ranks; {} = all that is allowed
    state: tuple[str, ...] = ()  # what its training keeps beside parameters, usage and calls
    # beginning of a trainable parameter's name -> why the losses of a step give it no gradient
    no_gradient: dict[str, str] = {}
    # quantizer_options with which codes or rows differ
    other_codes: tuple[dict[str, Any], ...] = ()


HAS_LIBRARY = find_spec("vector_quantize_pytorch") is not None
DISCRETE = [name for name, kind in QUANTIZERS.items() if kind.discrete]  # "none" has tests of its own
_NO_LIBRARY = pytest.mark.skipif(not HAS_LIBRARY, reason="the extra `library` is not installed")

FROZEN_ENCODER = dict.fromkeys(("encoder.", "down_projection."), "the encoder is a frozen teacher")

KINDS: dict[str, Kind] = dict.fromkeys(DISCRETE, Kind()) | {
    "multi_codebook": Kind(entropy=True),
    "ibq": Kind(entropy=True, other_codes=({"normalize": True},)),
    "ema": Kind(
        codebooks={"init": "kmeans", "init_images": 16}, state=("started",), other_codes=({"decay": 0.5},)
    ),
    "shared_index": Kind(entropy=True, other_codes=({"block_widths": [3, 1]}, {"block_weights": [1.0, 9.0]})),
    "attention": Kind(entropy=True, other_codes=({"norm": None},)),
    "residual": Kind(
        {"scales": [1, 2]},
        entropy=True,
        other_codes=({"inner": "nearest"}, {"detach": False}),
    ),
    # books of unequal size: 5 adjectives twice, 9 nouns
    "language": Kind(
        {"adjectives": 5, "nouns": 9, "word_dim": 6, "hidden": 8, "edges": 2},
        {"num_codebooks": 3, "codebook_size": 9, "codebook_dim": 8},
        state=("vectors", "edges", "is_set"),
        other_codes=({"dropout": 0.1},),
        codebooks={"init_images": 0},
    ),
    "language_map": Kind(
        {"word_dim": 8, "hidden": 8},
        entropy=True,
        state=("vectors", "edges", "is_set"),
        other_codes=({"gradient": "rotation"},),
        codebooks={"init_images": 0},
    ),
    "library": Kind(
        {"kind": "FSQ", "levels": [4, 4, 4, 4], "preserve_symmetry": True},
        {"codebook_size": 256, "codebook_dim": 4},
        other_codes=({"preserve_symmetry": False},),
        codebooks={"init_images": 0},
    ),
    "nearest_ema": Kind(
        codebooks={"init": "kmeans", "init_images": 16},
        state=("size", "total", "started"),
        other_codes=({"decay": 0.5},),
    ),
    # books of unequal size: one of features, five of geometry
    "gaussian": Kind(
        {"levels": [8, 8, 4, 3, 2]},
        {"num_codebooks": 6, "codebook_size": 16, "codebook_dim": 9},
        codebooks={"init": "kmeans", "init_images": 16},
        state=("size", "total", "started", "largest", "mean_scale"),
        other_codes=({"levels": [8, 8, 4, 2, 2]}, {"inner": "nearest"}),
    ),
    "cluster": Kind(state=("probability",), no_gradient=FROZEN_ENCODER, other_codes=({"decay": 0.5},)),
}

# the other quantisers behind the entry `library`; the name of a variant is "<entry> <kind>"
VARIANTS: dict[str, Kind] = {
    "library LFQ": Kind(
        {"kind": "LFQ"},
        {"codebook_size": 16, "codebook_dim": 4},
        entropy=True,
        other_codes=({"codebook_scale": 2.0},),
        codebooks={"init_images": 0},
    ),
    "library SimVQ": Kind({"kind": "SimVQ"}, codebooks={"init_images": 0}),
    "library ResidualVQ": Kind({"kind": "ResidualVQ"}, codebooks={"init_images": 0}),
}
KINDS |= VARIANTS

# all entries, for parametrised tests; variants of an entry in `make test-slow` alone
INSTALLED = [name for name in KINDS if HAS_LIBRARY or not name.startswith("library")]
ENTRIES = [
    pytest.param(
        name,
        marks=[_NO_LIBRARY] * name.startswith("library") + [pytest.mark.slow] * (name in VARIANTS),
    )
    for name in KINDS
]


def entry_of(name: str) -> str:
    """The entry of QUANTIZERS behind a name of KINDS."""
    return name.partition(" ")[0]


def overrides(name: str) -> list[str]:
    """Overrides of a run's config that choose this kind."""
    kind = KINDS[name]
    fields = {"quantizer": entry_of(name), "quantizer_options": kind.options, **kind.model}
    changes = [f"model.{key}={json.dumps(value)}" for key, value in fields.items()]
    return [*changes, f"losses.entropy={0.1 * kind.entropy}"]
