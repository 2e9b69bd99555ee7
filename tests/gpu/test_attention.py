"""Attention of packed rows on a GPU: every implementation separates the samples of a row."""

import pytest
import torch

from open_unitok.mllm.attention import VARLEN

pytestmark = pytest.mark.gpu
IMPLEMENTATIONS = ("sdpa", "eager", VARLEN)


def packed(config, lengths, seed=0):
    """One row of text samples of these lengths, and the samples alone."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(5, config.text_config.vocab_size, (n,), generator=generator) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])
    return {"input_ids": torch.cat(rows)[None].cuda(), "position_ids": positions[None].cuda()}, rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_packed_samples_do_not_see_each_other(mllm, dtype):
    model = mllm().cuda().to(dtype)
    batch, rows = packed(model.config, (5, 17, 9))
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2  # a row that sees another one differs by 1
    with torch.no_grad():
        alone = [model(input_ids=row[None].cuda()).logits.float() for row in rows]
        expected = torch.cat(alone, dim=1).cpu()
        for name in IMPLEMENTATIONS:
            model.language_model.set_attn_implementation(name)
            found = model(**batch).logits.float().cpu()
            assert (found - expected).abs().mean() < tolerance * expected.std(), name


def test_gradients_of_all_implementations_agree(mllm):
    model = mllm().cuda()
    batch, _ = packed(model.config, (5, 17, 9))
    found = {}
    for name in IMPLEMENTATIONS:
        model.language_model.set_attn_implementation(name)
        model.zero_grad(set_to_none=True)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        found[name] = model.get_input_embeddings().weight.grad.cpu()
    first = next(iter(found.values()))
    assert first.abs().max() > 0
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, first, rtol=1e-3, atol=1e-5, msg=name)
