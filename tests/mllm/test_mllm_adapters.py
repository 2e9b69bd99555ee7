"""Adapters of others: all-linear has no dead weights; broken and hostile folders end in one line."""

import json
import os

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from open_unitok.core.errors import UserError
from open_unitok.mllm.lora import merge_adapter

IDS = torch.tensor([[7, 8, -200, -200, -200, -200, 9, 10, 11], [20, 21, 22, -200, -200, -200, -200, 4, 2]])
LABELS = torch.tensor([[-100] * 6 + [9, 10, 11], [-100] * 3 + [-200] * 4 + [4, 2]])


@pytest.fixture
def codes():
    return torch.randint(0, 8, (2, 4, 3), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def adapted(tiny):
    """A model with LoRA on all linear layers; its weights are random, not zero."""
    model = get_peft_model(tiny(), LoraConfig(r=2, target_modules="all-linear"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_every_weight_of_all_linear_gets_a_gradient(adapted, codes):
    adapted.train()(input_ids=IDS, image_codes=codes, labels=LABELS).loss.backward()
    weights = {name: p for name, p in adapted.named_parameters() if "lora_" in name}
    assert any("visual_embedder.projection.attention.qkv" in name for name in weights)
    assert not [name for name, p in weights.items() if p.grad is None or not p.grad.abs().sum() > 0]


def test_merging_all_linear_changes_nothing(adapted, tiny, codes, tmp_path):
    inputs = {"input_ids": IDS, "image_codes": codes, "labels": LABELS}
    adapted.eval().save_pretrained(tmp_path)
    merged = merge_adapter(tiny(), tmp_path)
    torch.testing.assert_close(merged(**inputs).loss, adapted(**inputs).loss, atol=1e-4, rtol=1e-4)


def config(**fields):
    def spoil(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return spoil


def weights(change):
    def spoil(folder):
        path = folder / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    return spoil


class Evil:
    """A pickle that would run a command."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return (os.system, (f"touch {self.folder}/code-ran",))


def to_pickle(folder):
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"a": Evil(folder)}, folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (to_pickle, "without running code"),
        (config(r=10**9), "r = 1000000000, but the weights have rank 2"),
        (config(r="x"), "adapter_config.json"),
        (config(peft_type="EVIL"), "EVIL"),
        (config(rank_pattern={"(a+)+$": 2}), "must not repeat groups"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "JSON object"),
        (lambda folder: os.truncate(folder / "adapter_model.safetensors", 100), "adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no weights"),
        (weights(lambda w: {k.replace("q_proj", "x"): t for k, t in w.items()}), "does not fit this model"),
        (weights(lambda w: {k: t[..., :1].clone() for k, t in w.items()}), "does not fit this model"),
        (weights(lambda w: {k: t * float("nan") for k, t in w.items()}), "holds NaN"),
    ],
)  # fmt: skip
def test_broken_adapters(tiny, tmp_path, spoil, words):
    model = get_peft_model(tiny(), LoraConfig(r=2, target_modules=r".*\.(q_proj|up_proj)"))
    model.save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        merge_adapter(tiny(), tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert not (tmp_path / "code-ran").exists()


def test_a_pattern_that_never_ends_is_not_matched(tiny, codes, tmp_path):
    """The modules are those of the weights."""
    model = get_peft_model(tiny(), LoraConfig(r=2, target_modules=r".*\.(q_proj|up_proj)"))
    model.save_pretrained(tmp_path)
    config(target_modules="(.+)+(.+)+!")(tmp_path)
    merge_adapter(tiny(), tmp_path)
