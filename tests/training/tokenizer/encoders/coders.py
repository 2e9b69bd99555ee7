"""Small configs of every entry of ENCODERS and DECODERS, for the tests that run all of them.

Images have 32 x 32 pixels. A new entry gets at least one case.
"""

import json
from typing import Any, NamedTuple

from open_unitok.tokenizer.decoders import DECODERS
from open_unitok.tokenizer.encoders import ENCODERS

OWN_TESTS = {"autoencoder_kl"}  # needs diffusers: test_adapt.py


class Case(NamedTuple):
    """Fields of UniTokConfig, by which the config of `data` differs, and what holds for them.

    "CLIP" in a value stands for the folder of the tiny CLIP of 32 pixels and patches of 8.
    """

    model: dict[str, Any] = {}
    run: tuple[str, ...] = ()  # further overrides of the run
    # changes of `model` under which the same weights give other codes
    other_codes: tuple[dict[str, Any], ...] = ()
    generates: bool = True  # whether an MLLM can generate the codes
    frozen: tuple[str, ...] = ()  # beginnings of the parameters that are not trained


VIT = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT |= {"intermediate_size": 32}
FROM_CLIP = {"path": "CLIP", "layer": -2, "resize": True}
TOWER = {"encoder": "hf_vision", **FROM_CLIP}
PIXEL = {"encoder": "vitamin", "num_hidden_layers": 1}
CNN = {"channels": 8, "multipliers": [1, 1, 1, 1, 1], "residual_blocks": 1, "attention_levels": [4]}
CNN |= {"norm_groups": 4, "hidden_size": 8}
SHARED = {"quantizer": "shared_index", "num_codebooks": 1}
WIDE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "mlp_ratio": 3.0}
DEEP = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "decoder_widths": [12, 4]}
# images have 4 tokens
TOFU = {"method": "tofu", "r": 1, "prune_until": 1}
CLUSTER = {"method": "cluster", "at": 1, "keep": 0.5, "k": 2, "alpha": 0.5}
QUERIES = {"token_layout": {"rows": 2, "columns": 2, "tokens": 3}}

# with the VQGAN of their recipe, and rows by moving averages: test_gaussian.py
GAUSSIANS = {
    "patch_size": 8,
    "token_layout": {"rows": 4, "columns": 4, "tokens": 5},
    "quantizer": "gaussian",
    "quantizer_options": {"levels": [8, 8, 4, 3, 2], "inner": "nearest"},
    "num_codebooks": 6,
    "codebook_size": 16,
    "codebook_dim": 9,
    "projection": "none",
}

CASES: dict[str, Case] = {
    "vitamin": Case({"encoder": "vitamin", "decoder": "vitamin"}),
    # widths, depths and heads of their own
    "vitamin, two sizes": Case({"encoder_options": WIDE, "decoder_options": DEEP}),
    "vitamin, tofu": Case(
        {"encoder_options": {"num_hidden_layers": 2, "merge": TOFU}},
        other_codes=(
            {"encoder_options": {"num_hidden_layers": 2}},
            {"encoder_options": {"num_hidden_layers": 2, "merge": {"method": "tome", "r": 1}}},
        ),
    ),
    "vitamin, clusters": Case(
        {"encoder_options": {"num_hidden_layers": 2, "merge": CLUSTER}},
        other_codes=({"encoder_options": {"num_hidden_layers": 2, "merge": CLUSTER | {"keep": 3}}},),
    ),
    "hf_vision": Case(
        {"encoder": "hf_vision", "encoder_options": VIT},
        other_codes=({"encoder_options": VIT | {"mean": [0.4] * 3, "std": [0.2] * 3}},),
    ),
    "hf_vision, from a folder": Case({"encoder": "hf_vision", "encoder_options": FROM_CLIP}),
    "hf_vision, frozen": Case(
        {"encoder": "hf_vision", "encoder_options": FROM_CLIP},
        ("freeze=[encoder]",),
        frozen=("encoder.",),
    ),
    "vit decoder": Case(
        {
            "encoder": "hf_vision",
            "encoder_options": VIT | {"patch_size": 8},
            "patch_size": 8,
            "decoder": "vit",
        }
    ),
    "vqgan, without a text tower": Case(
        {
            "encoder": "vqgan",
            "encoder_options": CNN,
            "decoder": "vqgan",
            "decoder_options": CNN,
            "projection": "linear",
            "embed_dim": 0,
        },
        ("losses.clip=0",),
    ),
    "gaussian": Case(
        {
            **GAUSSIANS,
            "encoder": "gaussian",
            "encoder_options": VIT | {"encoder": "hf_vision", "patch_size": 8, "rounds": 2},
            "decoder": "gaussian",
            "decoder_options": {"decoder": "vit"},
        },
        ("losses.entropy=0",),
    ),
    "resampled": Case(
        {
            **QUERIES,
            "encoder": "resampled",
            "encoder_options": {"query_layers": 1},
            "decoder": "resampled",
            "decoder_options": {"query_layers": 1},
        },
    ),
    "resampled, of a folder": Case(
        {
            **QUERIES,
            "encoder": "resampled",
            "encoder_options": {"query_layers": 1, "encoder": "hf_vision", **FROM_CLIP},
            "decoder": "resampled",
            "decoder_options": {"query_layers": 1},
        },
        ("freeze=[encoder.inner]",),
        frozen=("encoder.inner.",),
    ),
    "dual": Case({**SHARED, "encoder": "dual", "encoder_options": {"semantic": TOWER, "pixel": PIXEL}}),
    "dual, frozen": Case(
        {
            **SHARED,
            "encoder": "dual",
            "encoder_options": {
                "semantic": TOWER | {"projection": "tanh"},
                "pixel": {"encoder": "vqgan", **CNN},
            },
            "quantizer_options": {"block_widths": [2, 2], "decoded_blocks": [1]},
            "projection": "linear",
        },
        ("freeze=[encoder.semantic]", "losses.clip=0.0"),
        frozen=("encoder.semantic.", "text_", "image_", "logit_"),
    ),
    "dual, pyramid": Case(
        {
            **SHARED,
            "encoder": "dual",
            "encoder_options": {"semantic": TOWER, "pixel": PIXEL},
            "quantizer": "residual",
            "quantizer_options": {"inner": "shared_index", "scales": [1, 2]},
        },
        generates=False,
    ),
}


def overrides(name: str, clip: Any) -> list[str]:
    """Overrides of a run's config that choose this case; `clip` is the folder that "CLIP" stands for."""
    case = CASES[name]
    fields = json.loads(json.dumps(case.model).replace('"CLIP"', json.dumps(str(clip))))
    return [*(f"model.{key}={json.dumps(value)}" for key, value in fields.items()), *case.run]


def entries_without_a_case() -> set[str]:
    """Names of the entries that no case builds."""
    encoders = {case.model.get("encoder", "vitamin") for case in CASES.values()}
    decoders = {case.model.get("decoder", "vitamin") for case in CASES.values()}
    return (ENCODERS.keys() - encoders | DECODERS.keys() - decoders) - OWN_TESTS
