"""Fixtures: the tiny published tokenizers of the golden files, loaded as `UniTok`."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.tokenizer.convert import state_from_published

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizer"
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def published():
    """The published state dict of the "attn" variant."""
    return torch.load(GOLDEN / "reference_ckpt.pth", weights_only=True)["trainer"]["unitok"]


@pytest.fixture(scope="session")
def tiny_config():
    """tiny_config(**changes) -> the config of the golden models."""

    def build(**changes) -> UniTokConfig:
        sizes = {
            "image_size": 64,
            "stem_width": 16,
            "stage_widths": (16, 32),
            "stage_depths": (2, 4),
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "decoder_widths": (32, 16),
            "decoder_depths": (4, 2),
            "num_codebooks": 4,
            "codebook_size": 64,
            "codebook_dim": 4,
            "embed_dim": 32,
            "text_hidden_size": 64,
            "text_num_layers": 2,
            "text_num_heads": 2,
            "text_vocab_size": 512,
            "text_context_length": 16,
        }
        return UniTokConfig(**{**sizes, **changes})

    return build


@pytest.fixture(scope="session")
def variant(published, tiny_config):
    """variant(name) -> a new model, out (golden tensors), meta (golden numbers), weights (published)."""
    changes = {
        "attn": {},
        "linear": {"projection": "linear"},
        "attn_altsize": {"image_size": 96},
        "attn_numquery4": {"num_register_tokens": 4},
    }

    def load(name: str) -> SimpleNamespace:
        meta = json.loads((GOLDEN / f"{name}.meta.json").read_text())
        weights = dict(published)
        for key in meta.get("weights_removed_keys", []):
            del weights[key]
        if (GOLDEN / f"{name}.delta.safetensors").exists():
            weights |= load_file(GOLDEN / f"{name}.delta.safetensors")
        state = state_from_published(weights)
        state["quantizer.calls"].zero_()
        model = UniTok(tiny_config(**changes[name]))
        model.load_state_dict(state)
        out = load_file(GOLDEN / f"{name}.outputs.safetensors")
        return SimpleNamespace(model=model.eval(), out=out, meta=meta, weights=weights)

    return load
