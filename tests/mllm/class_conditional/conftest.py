"""Fixtures: the golden file of the published class-conditional module, as our model."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from open_unitok.mllm.class_conditional import ClassConditionalConfig, ClassConditionalModel
from open_unitok.mllm.class_conditional.convert import from_llamagen


@pytest.fixture
def published(golden):
    """model, out (tensors), meta, weights (published names) of the golden file."""
    out = load_file(golden / "heads" / "c2i.safetensors")
    meta = json.loads((golden / "heads" / "c2i.meta.json").read_text())
    weights = {key[8:]: value for key, value in out.items() if key.startswith("weights.")}
    copies = {name: tensor.clone() for name, tensor in weights.items()}
    model = from_llamagen(copies, "golden", num_heads=2, num_image_tokens=16, dropout=0.0)
    return SimpleNamespace(model=model, out=out, meta=meta, weights=weights)


@pytest.fixture
def tiny():
    """tiny(**fields) -> a small random model whose output layer is not zero."""

    def make(**fields):
        sizes = {
            "num_classes": 5, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 48, "depth_layers": 1, "num_codebooks": 3, "codebook_size": 11,
            "num_image_tokens": 9, "dropout": 0.0,
        }  # fmt: skip
        torch.manual_seed(0)
        model = ClassConditionalModel(ClassConditionalConfig(**{**sizes, **fields})).eval()
        torch.nn.init.normal_(model.depth_head.output.weight, std=0.3)
        return model

    return make
