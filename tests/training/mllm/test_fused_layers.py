"""Fused layers in training on a CPU: losses and gradients of transformers' modules, and where they run."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from open_unitok.mllm import UniTokForConditionalGeneration, UniTokMLLMConfig
from open_unitok.mllm.lora import add_lora
from open_unitok.training.mllm.fused_layers import fuse_layers, group_samples

IMAGE = 4
TEXT = {"model_type": "llama", "vocab_size": 40, "hidden_size": 24, "intermediate_size": 40}
TEXT |= {"num_hidden_layers": 2, "num_attention_heads": 3}
SIZES = {"num_codebooks": 3, "codebook_size": 8, "codebook_dim": 4, "visual_hidden_size": 12}


def build(text=None, **fields) -> UniTokForConditionalGeneration:
    torch.manual_seed(0)
    config = UniTokMLLMConfig(
        text_config={**TEXT, **(text or {})}, depth_config={"num_hidden_layers": 2}, num_image_tokens=IMAGE,
        **{**SIZES, **fields},
    )  # fmt: skip
    model = UniTokForConditionalGeneration(config).train()
    with torch.no_grad():  # vectors start at one, where a wrong gradient may be right by chance
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.visual_embedder.freeze_codebooks()
    return model


def batch(model, packed: bool) -> dict:
    """Rows of samples of several lengths with images that are read and generated."""
    image = model.config.image_token_id
    samples = []
    for number, words in enumerate((3, 21, 6, 30, 2, 9)):
        text = [5 + (number + i) % 30 for i in range(words)]
        placeholders = [image] * IMAGE
        ids = [1, *placeholders, *text] if number % 2 else [1, *text, *placeholders]
        labels = [-100] * (1 + IMAGE) + text if number % 2 else [-100, *text, *placeholders]
        samples.append((ids, labels))
    rows = [samples[:2], samples[2:4], samples[4:]] if packed else [[sample] for sample in samples]
    length = max(sum(len(ids) for ids, _ in row) for row in rows)
    found = {"input_ids": [], "labels": [], "position_ids": [], "attention_mask": []}
    for row in rows:
        used = sum(len(ids) for ids, _ in row)
        rest = length - used
        found["input_ids"].append([i for ids, _ in row for i in ids] + [0] * rest)
        found["labels"].append([i for _, labels in row for i in labels] + [-100] * rest)
        found["position_ids"].append([i for ids, _ in row for i in range(len(ids))] + list(range(rest)))
        found["attention_mask"].append([1] * used + [0] * rest)
    del found["attention_mask" if packed else "position_ids"]
    codes = torch.randint(0, 8, (6, IMAGE, 3), generator=torch.Generator().manual_seed(1))
    return {**{name: torch.tensor(rows) for name, rows in found.items()}, "image_codes": codes}


def gradients(model, inputs, fused: bool, bf16: bool = False) -> dict[str, torch.Tensor]:
    """Losses and gradients by name."""
    model.fused_decoder = model.depth_head.fused_layers = None
    if fused:
        assert fuse_layers(model) and model.fused_decoder and model.depth_head.fused_layers
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = model(**inputs, return_logits=False)
    output.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"text": output.text_loss.detach(), "image": output.image_loss.detach(), **grads}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("options", [{}, {"depth_options": {"context": "raw"}}])
def test_losses_and_gradients_are_those_of_the_modules(packed, options):
    model = build(**options)
    inputs = batch(model, packed)
    want, found = gradients(model, inputs, False), gradients(model, inputs, True)
    assert found.keys() == want.keys() and len(want) > 40
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_bf16_is_as_exact_as_the_modules():
    model = build()
    inputs = batch(model, True)
    exact = gradients(model, inputs, False)

    def distance(found):
        return sum(((found[name] - value).norm() / value.norm()).item() for name, value in exact.items())

    modules = distance(gradients(model, inputs, False, bf16=True))
    assert 0 < distance(gradients(model, inputs, True, bf16=True)) < 1.1 * modules


def test_modules_are_not_called(monkeypatch):
    model = build()
    inputs = batch(model, True)
    calls = []
    original = LlamaDecoderLayer.forward
    monkeypatch.setattr(
        LlamaDecoderLayer, "forward", lambda self, *a, **k: calls.append(1) or original(self, *a, **k)
    )
    gradients(model, inputs, True)
    assert not calls
    gradients(model, inputs, False)
    assert len(calls) == 4
    # with hidden states, or in evaluation, the modules run
    assert fuse_layers(model)
    model(**inputs, output_hidden_states=True)
    model.eval()(**inputs)
    assert len(calls) == 4 + 2 * 4 - 2  # the depth head is fused beside the decoder's modules


def with_adapters():
    model = build()
    add_lora(model, ["language_model", "depth_head"], 2, 4.0)
    return model


def checkpointed():
    model = build()
    model.gradient_checkpointing_enable()
    return model


def hooked():
    model = build()
    for layers in (model.language_model.layers, model.depth_head.layers):
        layers[0].mlp.register_forward_hook(lambda *_: None)
    return model


def compiled():
    model = build()
    for layers in (model.language_model.layers, model.depth_head.layers):
        layers[1].compile(backend="eager")
    return model


@pytest.mark.parametrize("make", [with_adapters, checkpointed, hooked, compiled])
def test_other_layers_keep_their_modules(make):
    assert not fuse_layers(make())


def test_grouped_heads_keep_their_modules():
    model = build({"num_key_value_heads": 1})
    fuse_layers(model)
    assert model.fused_decoder is None


def test_groups_hold_every_token_once():
    lengths = [1, 17, 16, 33, 5, 2]
    groups = group_samples(lengths)
    tokens = torch.cat([group.flatten() for group in groups])
    assert sorted(tokens[tokens < sum(lengths)].tolist()) == list(range(sum(lengths)))
    assert all(group.shape[1] % 16 == 0 for group in groups)
