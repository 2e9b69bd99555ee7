"""Fixtures: the published tiny MLLMs of the golden files as our models, and their batches in our layout."""

import json
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from open_unitok.mllm import UniTokForConditionalGeneration, UniTokMLLMConfig
from open_unitok.mllm.convert import config_from_published, to_ours

LENGTH = 16  # visual tokens per image in the golden files


@pytest.fixture(scope="session")
def reference(golden, formula):
    """reference("tiny" | "truecb") -> a new model ("full" context), out (tensors), meta, weights."""

    @cache
    def files(name: str) -> SimpleNamespace:
        meta = json.loads((golden / "mllm" / f"{name}.meta.json").read_text())
        seed = meta["config"]["seed"]
        weights = {key: formula(key, shape, seed) for key, shape in meta["state_dict_keys"].items()}
        out = load_file(golden / "mllm" / f"{name}.outputs.safetensors")
        return SimpleNamespace(meta=meta, weights=weights, out=out)

    def load(name: str) -> SimpleNamespace:
        found = files(name)
        described = json.loads((golden / "mllm" / "config.json").read_text())
        config = config_from_published(described, found.weights)
        config.num_image_tokens, config.visual_context = LENGTH, "full"
        state = {key: tensor.clone() for key, tensor in to_ours(found.weights).items()}
        model = UniTokForConditionalGeneration.from_state(config, state, name)
        return SimpleNamespace(model=model, **vars(found))

    return load


@pytest.fixture(scope="session")
def batch_of():
    """batch_of(out, name) -> keyword arguments of `forward` for a golden batch: N placeholders per image."""

    def make(out: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor | None]:
        rows, images = [], []
        for r, kind in enumerate(out[f"{name}.data_types"].tolist()):
            ids, labels = [], []
            given = (out[f"{name}.{key}"][r].tolist() for key in ("input_ids", "labels", "attention_mask"))
            for token, label, real in zip(*given):
                repeat = LENGTH if token == -200 else 1
                if real:
                    ids += [token] * repeat
                    labels += [label if token != -200 or kind == 1 else -100] * repeat
            rows.append((ids, labels))
            if f"{name}.image.{r}" in out:
                images.append(out[f"{name}.image.{r}"].transpose(1, 2))
        return {**fill_up(rows), "image_codes": torch.cat(images) if images else None}

    return make


def fill_up(rows: list[tuple[list[int], list[int]]], side: str = "right") -> dict[str, torch.Tensor]:
    """Rows of ids and labels -> input_ids, attention_mask, labels; pads are 0."""
    longest = max(len(ids) for ids, _ in rows)
    padded = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids, labels in rows:
        gap = [0] * (longest - len(ids))
        for key, values, fill in (
            ("input_ids", ids, 0),
            ("attention_mask", [1] * len(ids), 0),
            ("labels", labels, -100),
        ):
            filled = [fill] * len(gap)
            padded[key].append(filled + values if side == "left" else values + filled)
    return {key: torch.tensor(values) for key, values in padded.items()}


@pytest.fixture(scope="session")
def pad_rows():
    return fill_up


TEXT = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="session")
def tiny_config():
    """tiny_config(**changes) -> the smallest config that has all parts."""

    def make(**changes) -> UniTokMLLMConfig:
        fields = {
            "text_config": TEXT,
            "depth_config": {"num_hidden_layers": 2},
            "num_codebooks": 3,
            "codebook_size": 8,
            "codebook_dim": 4,
            "visual_hidden_size": 24,
            "num_image_tokens": 4,
        }
        return UniTokMLLMConfig(**{**fields, **changes})

    return make


@pytest.fixture
def tiny(tiny_config):
    """tiny(**changes) -> a random model in evaluation mode; weights are enlarged, so that errors show."""

    def make(**changes) -> UniTokForConditionalGeneration:
        torch.manual_seed(0)
        model = UniTokForConditionalGeneration(tiny_config(**changes))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4)
        return model.eval()

    return make
