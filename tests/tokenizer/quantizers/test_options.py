"""`quantizer_options` of a wrong type or range: one line for every option of every entry."""

import math

import pytest
import torch

from open_unitok.core.errors import UserError
from open_unitok.tokenizer import QUANTIZERS, UniTokConfig
from open_unitok.tokenizer.quantizers import build_quantizer
from open_unitok.tokenizer.quantizers.base import option_names

from .kinds import KINDS, VARIANTS

WRONG = ["x", "1e-5", -1, 0, 1.5, True, [], [1], {}, math.nan, math.inf, [[1]], ["a"], -0.5]
SHAPE = {
    "image_size": 32,
    "embed_dim": 0,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "projection": "linear",
}
BOOKS = {"num_codebooks": 2, "codebook_size": 16, "codebook_dim": 4}
ENTRIES = [*QUANTIZERS, *VARIANTS]


def build(name, **changes):
    kind = KINDS.get(name)
    model, options = (kind.model, kind.options) if kind else ({}, {})
    fields = {**SHAPE, **BOOKS, **model, "quantizer_options": {**options, **changes}}
    return build_quantizer(UniTokConfig(quantizer=name.partition(" ")[0], **fields))


@pytest.mark.parametrize("name", ENTRIES)
def test_a_wrong_value_is_refused_or_works(name):
    """Nothing but a UserError of one line; what is accepted gives finite losses."""
    if name.startswith("library"):
        pytest.importorskip("vector_quantize_pytorch")
    refused = 0
    for option in option_names(QUANTIZERS[name.partition(" ")[0]]):
        for value in WRONG:
            try:
                quantizer = build(name, **{option: value})
            except UserError as error:
                assert "\n" not in str(error)
                refused += 1
                continue
            latents = torch.randn(2, 4, quantizer.latent_dim * (1 + quantizer.moments))
            quantizer.start_step(torch.Generator().manual_seed(0))
            found = quantizer(latents)
            assert all(loss.isfinite() for loss in found.losses.values()), (option, value)
            assert found.quantised.isfinite().all(), (option, value)
    assert refused


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (
            "multi_codebook",
            {"entropy_eps": "1e-5"},
            r"entropy_eps is '1e-5': expected a finite number, with a po",
        ),
        ("multi_codebook", {"entropy_eps": 0}, "quantizer_options.entropy_eps is 0: it must be above 0"),
        ("ibq", {"temperature": 0.0}, "quantizer_options.temperature is 0.0: it must be above 0"),
        ("ibq", {"codebook": -1}, "quantizer_options.codebook is -1: it must be at least 0"),
        ("ibq", {"normalize": "yes"}, "normalize is 'yes': expected true or false"),
        ("residual", {"scales": ["a"]}, r"scales is \['a'\]|scales = \['a'\]"),
        ("residual", {"inner": "ibq", "inner_options": {"through": None}}, r"inner_options.through is None"),
        (
            "shared_index",
            {"block_widths": 4},
            r"block_widths is 4: expected a list \(a whole number each\) or nu",
        ),
        ("language", {"adjectives": 0}, "adjectives is 0: it must be at least 2"),
    ],
)
def test_the_message_names_option_value_and_what_is_allowed(name, options, words):
    with pytest.raises(UserError, match=words):
        build(name, **options)
