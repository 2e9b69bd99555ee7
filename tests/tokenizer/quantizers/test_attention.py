"""CODA's attention quantiser: gradients of the lean form, and what is read and reset. The published vectors
are of pyramids: test_residual.py."""

import pytest
import torch

from open_unitok.core.errors import UserError
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.quantizers import QUANTIZERS
from open_unitok.tokenizer.quantizers import base as quantizer_base


def make(entries=32, width=6, books=1, **options):
    torch.manual_seed(0)
    return QUANTIZERS["attention"](books, entries, width, **options)


@pytest.mark.parametrize("norm", ["rms", "layer", None])
def test_the_lean_form_equals_one_hot_rows(norm, monkeypatch):
    """z_q = (h - sg(p) + p) (W_v E), with its three loss terms, written with (R, V) one-hots."""
    quantizer = make(attention_dim=5, norm=norm)
    latents = torch.randn(2, 15, 6, requires_grad=True)
    cotangent = torch.randn(2, 15, 6)

    def gradients(quantised, vq, entropy):
        quantizer.zero_grad()
        latents.grad = None
        (vq + 0.05 * entropy + (quantised * cotangent).sum()).backward()
        return {"latents": latents.grad.clone()} | {
            name: p.grad.clone() for name, p in quantizer.named_parameters()
        }

    def one_hot():
        rows = quantizer.codebooks[0]
        keys, values = quantizer.key_norm(quantizer.key(rows)), quantizer.value(rows)
        logits = quantizer.query_norm(quantizer.query(latents)) @ keys.T / 5**0.5
        p = logits.softmax(-1)
        h = torch.nn.functional.one_hot(logits.argmax(-1), 32).float()
        first, second = (h - p.detach() + p) @ values, h @ values
        vq = (first - latents).square().mean() + (second.detach() - latents).square().mean()
        vq = vq + 0.05 * (second - latents.detach()).square().mean()
        sharp = (logits / 0.01).softmax(-1)
        per_latent = -(sharp * (logits / 0.01).log_softmax(-1)).sum(-1).mean()
        mean = sharp.mean((0, 1))
        return first, vq, per_latent + (mean * (mean + 1e-5).log()).sum()

    expected = gradients(*one_hot())
    monkeypatch.setattr(quantizer_base, "SIMILARITY_BLOCK", 32 * 7)
    out = quantizer(latents, entropy=True)
    found = gradients(out.quantised, out.losses["vq"], out.losses["entropy"])
    assert found.keys() == expected.keys()
    for name in expected:
        scale = max(1, expected[name].abs().max().item())
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=2e-5 * scale, msg=name)


def test_embed_and_table_are_values():
    quantizer = make(books=2)
    codes = quantizer.encode(torch.randn(1, 9, 12))
    rows = torch.stack([quantizer.codebooks[k][codes[..., k]] for k in range(2)], dim=-2)
    torch.testing.assert_close(quantizer.embed(codes), quantizer.value(rows).flatten(-2))
    torch.testing.assert_close(quantizer.code_table(), quantizer.value(quantizer.codebooks).detach())
    assert quantizer.row_norm == "none" and not torch.equal(quantizer.code_table(), quantizer.codebooks)


def test_no_block_exceeds_its_size(monkeypatch):
    sizes = []
    whole = torch.log_softmax
    monkeypatch.setattr(quantizer_base, "SIMILARITY_BLOCK", 32 * 10)
    monkeypatch.setattr(torch, "log_softmax", lambda x, **kw: sizes.append(x.numel()) or whole(x, **kw))
    make()(torch.randn(2, 30, 6, requires_grad=True), entropy=True).losses["entropy"].backward()
    assert len(sizes) >= 12 and max(sizes) <= 320  # each block twice: forward, and again in the backward pass


def test_every_map_is_in_the_fingerprint(tiny_config):
    torch.manual_seed(0)
    model = UniTok(tiny_config(quantizer="attention", quantizer_options={"norm": "layer"}))
    before = model.fingerprint()
    for name, parameter in model.quantizer.named_parameters():
        with torch.no_grad():
            parameter.add_(1e-3)
            assert model.fingerprint() != before, name
            parameter.sub_(1e-3)


def test_invalid_options():
    with pytest.raises(UserError, match=r"norm = 'rmsnorm'\. Did you mean 'rms'"):
        make(norm="rmsnorm")
    with pytest.raises(UserError, match="attention_dim = 0: must be at least 1"):
        make(attention_dim=0)
