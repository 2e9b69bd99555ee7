"""TokenFlow's shared index: the published module's codes, losses and gradients, and its properties."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from open_unitok.core.errors import UserError
from open_unitok.tokenizer.quantizers import QUANTIZERS
from open_unitok.tokenizer.quantizers import base as quantizer_base

WEIGHTS = [0, 0.3, 0.6, 1, 500, 1000]


@pytest.fixture(scope="module")
def vectors(golden):
    folder = golden / "quantizers"
    meta = json.loads((folder / "tokenflow.meta.json").read_text())["cases"]
    return load_file(folder / "tokenflow.safetensors"), meta


def near(found, expected, tolerance):
    """Differences are measured over max(1, largest value)."""
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


def tokens(grid):
    return grid.flatten(2).transpose(1, 2)


def make(entries=512, widths=(32, 8), weight=1.0, books=1, **options):
    torch.manual_seed(0)
    return QUANTIZERS["shared_index"](
        books, entries, sum(widths), block_widths=list(widths), block_weights=[1.0, weight], **options
    )


@pytest.mark.parametrize("weight", [1, 0, 0.3, 1000])
def test_published_values_and_gradients(vectors, weight, monkeypatch):
    monkeypatch.setattr(quantizer_base, "SIMILARITY_BLOCK", 24 * 7)  # several blocks: they change nothing
    tensors, case = vectors[0], f"single_w{weight}"
    meta = vectors[1][case]
    quantizer = make(24, (6, 3), weight)
    rows = torch.cat([tensors["weights.semantic_table"], tensors["weights.pixel_table"]], dim=-1)
    quantizer.codebooks.data = rows[None].clone()
    latents = tokens(torch.cat([tensors["in.semantic"], tensors["in.pixel"]], dim=1)).requires_grad_()
    out = quantizer(latents, entropy=True)
    assert torch.equal(out.codes[..., 0], tensors[f"{case}.out.codes"])
    assert torch.equal(quantizer.encode(latents.detach()), out.codes)
    near(out.quantised.detach(), tokens(tensors[f"{case}.out.quantised"]), 5e-6)
    assert out.losses["vq"].item() == pytest.approx(meta["codebook"] + meta["commitment"], abs=5e-6)
    assert 0.1 * out.losses["entropy"].item() == pytest.approx(meta["entropy"], abs=1e-5)
    if weight == 1:
        cotangent = tokens(tensors["in.cotangent_4"])
        loss = out.losses["vq"] + 0.1 * out.losses["entropy"] + (out.quantised * cotangent).mean()
        loss.backward()
        grads = [tensors[f"{case}.grad.{name}"] for name in ("semantic", "pixel")]
        near(latents.grad, tokens(torch.cat(grads, dim=1)), 2e-5)
        grads = [tensors[f"{case}.grad.{name}_table"] for name in ("semantic", "pixel")]
        near(quantizer.codebooks.grad[0], torch.cat(grads, dim=-1), 2e-5)


def brute_force(latents, rows, weight, widths=(32, 8)):
    """The first smallest distance in float64, from differences."""
    found = []
    halves = [[F.normalize(h, dim=-1) for h in x.double().split(widths, dim=-1)] for x in (latents, rows)]
    for sem, pix in zip(*halves[0]):
        distance = (halves[1][0] - sem).square().sum(-1) + weight * (halves[1][1] - pix).square().sum(-1)
        found.append(distance.argmin())
    return torch.stack(found)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_codes_of_a_float64_search_of_distances(weight):
    quantizer = make(weight=weight)
    latents = torch.randn(2000, 40)
    expected = brute_force(latents, quantizer.codebooks[0].detach(), weight)
    assert torch.equal(quantizer.encode(latents[None]).flatten(), expected)


@pytest.mark.parametrize(("weight", "part"), [(0, slice(0, 32)), (1e4, slice(32, 40))])
def test_one_block_decides(weight, part):
    quantizer = make(weight=weight)
    latents = torch.randn(2000, 40)
    rows = quantizer.codebooks[0].detach()
    cosine = F.normalize(latents[:, part], dim=-1) @ F.normalize(rows[:, part], dim=-1).T
    best = cosine.topk(2, dim=-1).values
    clear = best[:, 0] - best[:, 1] > 2e-4  # below, 1e4 times the gap is less than the other block can add
    same = quantizer.encode(latents[None]).flatten() == cosine.argmax(dim=-1)
    assert same[clear].all() and clear.sum() > 1950


def test_each_book_searches_alone():
    quantizer = make(32, (5, 3), 0.5, books=3)
    latents = torch.randn(2, 20, 24)
    codes = quantizer.encode(latents)
    for book in range(3):
        chunk = latents[..., 8 * book : 8 * book + 8].flatten(0, 1)
        expected = brute_force(chunk, quantizer.codebooks[book].detach(), 0.5, (5, 3))
        assert torch.equal(codes[..., book].flatten(), expected)


def test_the_semantic_half_of_each_book():
    assert make(16, (3, 1), books=2).semantic_channels == [0, 1, 2, 4, 5, 6]
    options = {"inner": "shared_index", "inner_options": {"block_widths": [3, 1]}, "scales": [1, 2]}
    assert QUANTIZERS["residual"](1, 16, 4, **options).semantic_channels == [0, 1, 2]
    assert QUANTIZERS["residual"](1, 16, 4, scales=[1, 2]).semantic_channels is None


def test_length_of_rows_and_latents_changes_nothing():
    quantizer = make(64, (6, 2))
    latents = torch.randn(1, 50, 8)
    codes, embedded = quantizer.encode(latents), quantizer.embed(quantizer.encode(latents))
    scale = torch.tensor([3.0] * 6 + [0.2] * 2)
    with torch.no_grad():
        quantizer.codebooks.mul_(scale)
    assert torch.equal(quantizer.encode(latents * scale.flip(0)[:1] * scale), codes)
    torch.testing.assert_close(quantizer.embed(codes), embedded)
    for part in embedded.split([6, 2], dim=-1):
        torch.testing.assert_close(part.norm(dim=-1), torch.ones(1, 50))


def test_only_chosen_rows_get_a_gradient_without_entropy():
    quantizer = make(64, (6, 2))
    out = quantizer(torch.randn(1, 10, 8, requires_grad=True))
    (out.losses["vq"] + out.quantised.sum()).backward()
    used = torch.zeros(64, dtype=torch.bool)
    used[out.codes.flatten()] = True
    assert torch.equal(quantizer.codebooks.grad[0].abs().sum(-1) > 0, used)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block_widths": [32, 4]}, r"block_widths = \[32, 4\]: expected positive widths with the sum"),
        ({"block_widths": [40, 0]}, r"block_widths = \[40, 0\]: expected positive widths"),
        ({"block_weights": [1.0]}, r"block_weights = \[1.0\]: expected 2 weights, one per block"),
        ({"block_weights": [0.0, 0.0]}, r"none below 0 and at least one above"),
        ({"block_weights": [1.0, -1.0]}, r"none below 0 and at least one above"),
    ],
)
def test_invalid_blocks(options, words):
    with pytest.raises(UserError, match=words):
        QUANTIZERS["shared_index"](1, 64, 40, **options)
