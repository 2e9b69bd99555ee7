"""The multi-codebook quantiser: ties, blocks, losses, gradients."""

import pytest
import torch

from open_unitok.tokenizer.quantizers import base
from open_unitok.tokenizer.quantizers.multi_codebook import MultiCodebookQuantizer


@pytest.fixture
def quantizer() -> MultiCodebookQuantizer:
    torch.manual_seed(0)
    return MultiCodebookQuantizer(3, 32, 4)


def test_ties_go_to_the_first_entry(quantizer):
    with torch.no_grad():
        quantizer.codebooks[:, 20] = 3 * quantizer.codebooks[:, 7]  # the same direction
    latents = quantizer.codebooks[:, 20].reshape(1, 1, 12).detach()
    assert quantizer.encode(latents).tolist() == [[[7, 7, 7]]]


def test_block_size_does_not_change_results(quantizer, monkeypatch):
    latents = torch.randn(2, 10, 12, requires_grad=True)

    def all_results() -> list[torch.Tensor]:
        quantizer.zero_grad()
        latents.grad = None
        out = quantizer(latents, entropy=True)
        (out.losses["vq"] + out.losses["entropy"] + out.quantised.sum()).backward()
        return [out.codes, *out.losses.values(), latents.grad.clone(), quantizer.codebooks.grad.clone()]

    whole = all_results()
    monkeypatch.setattr(base, "SIMILARITY_BLOCK", 32 * 3)  # three rows at a time
    for one, other in zip(whole, all_results(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3 * other.abs().max().item())


def test_memory_is_bounded_by_one_block_of_similarities(quantizer, monkeypatch):
    monkeypatch.setattr(base, "SIMILARITY_BLOCK", 32 * 5)
    largest = 0

    class LargestProduct(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if function in (torch.Tensor.matmul, torch.Tensor.__matmul__, torch.matmul):
                largest = max(largest, result.numel())
            return result

    with LargestProduct():
        quantizer(torch.randn(4, 6, 12), entropy=True)
    assert 0 < largest <= 32 * 5


def test_straight_through_gradient(quantizer):
    latents = torch.randn(1, 5, 12, requires_grad=True)
    plain = latents.detach().clone().requires_grad_()
    out = quantizer(latents)
    torch.testing.assert_close(out.quantised, quantizer.embed(out.codes), rtol=0, atol=1e-6)
    weights = torch.randn_like(out.quantised)
    (out.quantised * weights).sum().backward()
    unit = torch.nn.functional.normalize(plain.unflatten(-1, (3, 4)), dim=-1).flatten(-2)
    (unit * weights).sum().backward()
    torch.testing.assert_close(latents.grad, plain.grad)
    assert quantizer.codebooks.grad is None or not quantizer.codebooks.grad.any()


def test_average_over_ranks_reaches_entropy_and_usage(quantizer):
    first, second = torch.randn(2, 1, 8, 12)
    whole = quantizer(torch.cat([first, second]), entropy=True)
    seen = []
    quantizer.average_over_ranks = lambda tensor: seen.append(tensor) or tensor
    quantizer(second, entropy=True)
    other = iter(list(seen))
    quantizer.average_over_ranks = lambda tensor: (tensor + next(other)) / 2
    out = quantizer(first, entropy=True)
    torch.testing.assert_close(out.usage, whole.usage)
    assert len(seen) == 2 and out.losses["entropy"] != 0


def test_entropy_is_zero_unless_requested(quantizer):
    assert quantizer(torch.randn(1, 4, 12)).losses["entropy"] == 0
