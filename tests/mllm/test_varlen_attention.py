"""Variable-length attention against a dense mask: losses and gradients of packed and padded rows."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from open_unitok.core.errors import UserError
from open_unitok.mllm import attention
from open_unitok.mllm.attention import VARLEN
from open_unitok.mllm.lora import add_lora
from open_unitok.mllm.positions import SampleBounds, find_bounds

IMAGE = -200
SIZES = {
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None,
}  # fmt: skip
FAMILIES = {
    "llama": {"model_type": "llama", **SIZES},
    "qwen3": {"model_type": "qwen3", "head_dim": 8, **SIZES},
    "mistral": {"model_type": "mistral", "sliding_window": 5, **SIZES},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5,
               "layer_types": ["sliding_attention", "full_attention"], **SIZES},
    "gemma": {"model_type": "gemma", "head_dim": 8, **SIZES},
}  # fmt: skip


def packed():
    """Two rows: generated and read images, text, and padding as a sample of its own or of several."""
    rows = [
        [[1, 8, 3, *[IMAGE] * 4, 4, 2], [1, 3, *[IMAGE] * 4, 4, 7, 9, 2], [5, 6, 7]],
        [[1, 9, 3, *[IMAGE] * 4, 4, 2], [11, 12, 13, 14, 15, 16, 17, 18], [0, 0, 0, 0, 0]],
    ]
    ids = torch.tensor([[i for sample in row for i in sample] for row in rows])
    positions = torch.tensor([[i for sample in row for i in range(len(sample))] for row in rows])
    positions[1, -3:] = 0  # padding whose positions do not count is a sample each
    labels = ids.masked_fill(positions == 0, -100)
    labels[0, 9:16] = -100  # an image that is read
    labels[1, -5:] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def padded():
    inputs = packed()
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, 12:] = 0
    return {"input_ids": inputs["input_ids"], "labels": inputs["labels"] * mask - 100 * (1 - mask)} | {
        "attention_mask": mask
    }


def codes():
    return torch.randint(0, 8, (3, 4, 3), generator=torch.Generator().manual_seed(5))


def run(model, name, inputs, autocast=False):
    """Losses and gradients of one training step under an attention implementation."""
    model.language_model.config._attn_implementation = name
    model.train().zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(**inputs, image_codes=codes(), reduction="sum", return_logits=False)
        out.loss.backward()
    losses = torch.stack([out.text_loss, out.image_loss]).detach()
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_equal(model, inputs, rtol=1e-5, atol=1e-5, autocast=False):
    expected, gradients = run(model, "sdpa", inputs, autocast)
    calls = []
    original = attention._by_sample
    attention._by_sample = lambda *args: calls.append(1) or original(*args)
    try:
        found, others = run(model, VARLEN, inputs, autocast)
    finally:
        attention._by_sample = original
    assert len(calls) >= 2  # each layer, and again where activations are recomputed
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    for name, gradient in gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(others[name], gradient, rtol=0, atol=scale * rtol * 10 + atol, msg=name)
    return len(calls)


@pytest.mark.parametrize("rows", [packed, padded])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_equal_those_of_a_dense_mask(tiny, family, rows):
    """With grouped queries, sliding windows, positions that restart, and padding of both kinds."""
    check_equal(tiny(text_config=FAMILIES[family]), rows())


def test_bf16(tiny):
    check_equal(tiny(), packed(), rtol=1e-2, atol=1e-2, autocast=True)


def test_checkpointing_recomputes_with_the_bounds(tiny):
    """Recomputed layers run outside the forward pass: they must not fall back to one causal row."""
    model = tiny()
    calls = check_equal(model, packed())
    model.gradient_checkpointing_enable()
    assert check_equal(model, packed()) == 2 * calls


def test_lora(tiny):
    model = tiny()
    add_lora(model, ["language_model", "depth_head"], 2, 4.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, and with it the gradients of A
            torch.nn.init.normal_(parameter, std=0.1)
    check_equal(model, packed())


def test_hidden_states_do_not_depend_on_other_samples(tiny):
    model, inputs = tiny(), packed()
    del inputs["labels"]
    model.language_model.config._attn_implementation = VARLEN
    with torch.no_grad():
        states = model(**inputs, image_codes=codes()).last_hidden_state
        inputs["input_ids"][0, 1] = 60  # of the first sample
        others = model(**inputs, image_codes=codes()).last_hidden_state
    differs = (states != others).any(dim=-1)
    assert differs[0, 1:9].all() and not differs[0, 9:].any() and not differs[1].any()


def test_generation_and_left_padding_are_as_under_sdpa(tiny):
    model = tiny()
    ids = torch.tensor([[0, 0, 1, 8, 9], [1, 5, 6, 7, 8]])
    mask = (ids != 0).long()
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "attention_mask": mask}
    expected, logits = model.generate(ids, **options), model(ids, attention_mask=mask, labels=ids).logits
    model.language_model.config._attn_implementation = VARLEN
    assert torch.equal(model.generate(ids, **options), expected)
    assert torch.equal(model(ids, attention_mask=mask, labels=ids).logits, logits)


def test_attention_weights_are_computed_by_eager(tiny):
    model, inputs = tiny(), packed()
    model.language_model.config._attn_implementation = VARLEN
    out = model(**inputs, image_codes=codes(), output_attentions=True)
    assert out.attentions[0].shape == (2, 4, 22, 22)
    assert not out.attentions[0][0, :, 9:, :9].any()


def test_a_decoder_that_drops_the_bounds_is_rejected():
    query = torch.zeros(1, 2, 5, 8)
    with pytest.raises(UserError, match="does not hand"):
        attention.varlen_attention(torch.nn.Module(), query, query, query, torch.empty(0, 0, 0, 0))


def stand_in(has_gqa):
    """torch's varlen_attn without its CUDA kernel: the same arguments and layout, by a dense mask."""

    def kernel(query, key, value, starts, starts_k, longest, longest_k, scale, window_size, **options):
        assert starts.dtype == torch.int32 and starts_k is starts and starts[-1] == len(query)
        assert longest == longest_k == int(starts.diff().max())
        assert all(x.is_contiguous() and x.dtype == torch.bfloat16 for x in (query, key, value))
        groups = query.shape[1] // key.shape[1]
        assert options == ({"enable_gqa": True} if has_gqa and groups > 1 else {})
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        sample = torch.bucketize(torch.arange(len(query)), starts[1:].long(), right=True)
        distance = torch.arange(len(query))[:, None] - torch.arange(len(query))
        mask = (sample[:, None] == sample) & (distance >= 0)
        assert window_size[1] == 0
        if window_size[0] >= 0:
            mask &= distance <= window_size[0]
        out = F.scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in (query, key, value)), attn_mask=mask, scale=scale
        )
        return out.transpose(0, 1)

    return kernel


@pytest.mark.parametrize("has_gqa", [True, False])  # torch 2.11's may lack the argument
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_kernel_is_called_with_its_arguments(monkeypatch, has_gqa, window, kv_heads):
    """Only the CUDA kernel itself is untried: its arguments give what SDPA per sample gives."""
    monkeypatch.setattr(attention, "varlen_attn", stand_in(has_gqa))
    monkeypatch.setattr(attention, "KERNEL_HAS_GQA", has_gqa)
    lengths = [7, 1, 4, 9]
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    inputs = [torch.randn(1, heads, 21, 8, dtype=torch.bfloat16) for heads in (4, kv_heads, kv_heads)]
    arguments = (*inputs, SampleBounds(starts, lengths), 0.0, 0.3, window)
    found, expected = attention._by_kernel(*arguments), attention._by_sample(*arguments)
    assert found.shape == expected.shape == (1, 21, 4, 8)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("mask", "lengths"),
    [
        ([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], [3, 2, 5]),
        ([[1, 1, 1, 1, 1]], [5]),
        ([[0, 1, 1, 1, 1]], None),  # padded on the left
        ([[1, 1, 0, 1, 1]], None),  # with a hole
        ([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], None),  # a row of padding
    ],
)
def test_bounds_of_padded_rows(mask, lengths):
    bounds = find_bounds(torch.tensor(mask), None)
    assert (bounds and bounds.lengths) == lengths
    if bounds:
        assert bounds.starts.tolist() == [0, *itertools.accumulate(bounds.lengths)]


def test_bounds_of_packed_rows():
    """A sample never spans rows, whatever its positions."""
    positions = torch.tensor([[0, 1, 2, 0, 1], [3, 4, 0, 0, 1]])
    assert find_bounds(None, positions).lengths == [3, 2, 2, 1, 2]
