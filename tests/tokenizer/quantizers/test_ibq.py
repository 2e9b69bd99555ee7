"""IBQ: the published module's outputs, losses and gradients, in float32 and float64, and its properties."""

import json

import pytest
import torch
from safetensors.torch import load_file

from open_unitok.tokenizer.quantizers import QUANTIZERS
from open_unitok.tokenizer.quantizers import base as quantizer_base

CASES = ["single", "entropy", "peaked", "books", "books_plain", "beta", "normalized"]


@pytest.fixture(scope="module")
def vectors(golden):
    tensors = load_file(golden / "quantizers" / "ibq.safetensors")
    return tensors, json.loads((golden / "quantizers" / "ibq.meta.json").read_text())["cases"]


def build(settings, rows):
    options = {"codebook": settings["beta"], "temperature": settings["temperature"]}
    normalize = settings.get("normalize", False)
    if normalize:
        with pytest.warns(UserWarning, match="nearly uniform"):
            quantizer = QUANTIZERS["ibq"](*rows.shape, **options, normalize=True)
    else:
        quantizer = QUANTIZERS["ibq"](*rows.shape, **options)
    quantizer.codebooks.data = rows.clone()
    return quantizer


def near(found, expected, relative):
    """Differences are measured against the largest magnitude of the tensor."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected.to(found), rtol=0, atol=relative * max(scale, 1e-12))


@pytest.mark.parametrize("case", CASES)
def test_published_values_and_gradients(vectors, case, monkeypatch):
    # several blocks per book: they must not change anything
    monkeypatch.setattr(quantizer_base, "SIMILARITY_BLOCK", 500)
    tensors, meta = vectors[0], vectors[1][case]
    settings, scalars = meta["settings"], {k: v["float32"] for k, v in meta["scalars"].items()}
    rows, cotangent = tensors[f"{case}.codebooks"], tensors[f"{case}.cotangent"]
    uses_entropy = bool(settings["entropy"])

    def run(wanted):
        quantizer = build(settings, rows)
        latents = tensors[f"{case}.latents"].clone().requires_grad_()
        out = quantizer(latents, entropy=uses_entropy)
        parts = {
            "out": (cotangent * out.quantised).sum(),
            "quantise": out.losses["vq"],
            "entropy": out.losses["entropy"],
        }
        parts["total"] = parts["out"] + parts["quantise"] + settings["entropy_weight"] * parts["entropy"]
        if wanted:
            parts[wanted].backward()
        return quantizer, latents, out, parts

    quantizer, latents, out, parts = run(None)
    assert torch.equal(out.codes, tensors[f"{case}.codes"])
    assert torch.equal(quantizer.encode(latents.detach()), out.codes)
    near(out.quantised.detach(), tensors[f"{case}.quantised"], 3e-6)
    near(quantizer.embed(out.codes).detach(), tensors[f"{case}.quantised"], 3e-6)
    for name in ("out", "quantise", "total", *(["entropy"] if uses_entropy else [])):
        assert parts[name].item() == pytest.approx(scalars[name], rel=1e-5, abs=5e-6), name
        quantizer, latents, *_ = run(name)
        tolerance = 3e-4 if uses_entropy and name in ("entropy", "total") else 2e-5
        near(latents.grad, tensors[f"{case}.grad_latents.{name}"], tolerance)
        near(quantizer.codebooks.grad, tensors[f"{case}.grad_codebooks.{name}"], tolerance)


def make(entries=64, width=16, books=1, **options):
    torch.manual_seed(0)
    return QUANTIZERS["ibq"](books, entries, width, **options)


def test_every_row_gets_a_gradient_from_the_output_alone():
    quantizer = make()
    latents = torch.randn(2, 16, 16, requires_grad=True)
    out = quantizer(latents)
    cotangent = torch.randn_like(out.quantised)
    (cotangent * out.quantised).sum().backward()
    assert (quantizer.codebooks.grad[0].abs().sum(dim=-1) > 0).all()
    assert len(out.codes.unique()) < 64
    # Cov_p(E) G, the closed form
    rows = quantizer.codebooks[0].detach()
    p = (latents.detach().flatten(0, 1) @ rows.T).softmax(dim=-1)
    mean = p @ rows
    g = cotangent.flatten(0, 1)
    weights = p * ((rows @ g.T).T - (mean * g).sum(-1, keepdim=True))
    expected = weights @ rows - weights.sum(-1, keepdim=True) * mean
    near(latents.grad.flatten(0, 1), expected, 1e-5)


def test_there_is_no_straight_through_path():
    quantizer = make()
    quantizer.codebooks.data[:] = quantizer.codebooks.data[:, :1]  # all rows equal: p carries no information
    latents = torch.randn(2, 8, 16, requires_grad=True)
    quantizer(latents).quantised.sum().backward()
    assert latents.grad.abs().max() < 1e-4
    # a one-hot p passes nothing on either
    quantizer, latents = make(), (1e4 * torch.randn(2, 8, 16)).requires_grad_()
    quantizer(latents).quantised.sum().backward()
    assert latents.grad.abs().max() < 1e-3


def test_entropy_of_sure_and_equal_use():
    rows = 100 * torch.eye(32)[None]
    quantizer = make(32, 32)
    quantizer.codebooks.data = rows.clone()
    every = quantizer(rows, entropy=True).losses["entropy"]
    assert every.item() == pytest.approx(-3.4654, abs=1e-3)  # -log 32
    assert quantizer(torch.zeros(1, 8, 32), entropy=True).losses["entropy"].item() == pytest.approx(
        0, abs=1e-3
    )
    one = quantizer(rows[:, :1].expand(1, 8, 32), entropy=True).losses["entropy"]
    assert one.item() == pytest.approx(0, abs=5e-5)


def test_inner_product_is_not_distance():
    quantizer = make(512, 32)
    latents = torch.randn(4, 64, 32)
    distance = torch.cdist(latents.flatten(0, 1), quantizer.codebooks[0]).argmin(dim=-1)
    assert (quantizer.encode(latents).flatten() != distance).float().mean() > 0.3


def test_blocks_do_not_hold_all_similarities(monkeypatch):
    sizes = []
    whole = torch.log_softmax
    monkeypatch.setattr(quantizer_base, "SIMILARITY_BLOCK", 64 * 10)
    monkeypatch.setattr(torch, "log_softmax", lambda x, **kw: sizes.append(x.numel()) or whole(x, **kw))
    make()(torch.randn(2, 30, 16, requires_grad=True), entropy=True).losses["entropy"].backward()
    assert len(sizes) >= 12 and max(sizes) <= 640  # each block twice: forward, and again in the backward pass
