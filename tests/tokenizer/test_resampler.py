"""Query resampler: the golden layer, and its shapes both ways."""

import pytest
import torch
from safetensors.torch import load_file

from open_unitok.core.errors import UserError
from open_unitok.tokenizer.resampler import QueryResampler


def test_golden_layer(golden):
    tensors = load_file(golden / "quantizers" / "language_codebook.safetensors")
    found = {k.removeprefix("resampler."): v for k, v in tensors.items() if k.startswith("resampler.")}
    resampler = QueryResampler(6, 32, heads=4)
    weights = {k: v for k, v in found.items() if k.endswith(("weight", "bias"))}
    resampler.layers[0].load_state_dict(weights)
    resampler.queries.data = found["queries"].clone()
    out = resampler(found["x"])
    torch.testing.assert_close(out.double(), found["out"], rtol=1e-5, atol=1e-5)


def test_there_and_back():
    torch.manual_seed(0)
    down, up = QueryResampler(4, 16, depth=2), QueryResampler(9, 16, depth=2)
    tokens = torch.randn(3, 9, 16, requires_grad=True)
    fewer = down(tokens)
    assert fewer.shape == (3, 4, 16) and up(fewer).shape == (3, 9, 16)
    up(fewer).square().sum().backward()
    for module in (down, up):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert tokens.grad.any()
    # the tokens have no order of their own
    torch.testing.assert_close(down(tokens.flip(1)), fewer)


@pytest.mark.parametrize(("sizes", "words"), [((0, 16), "num_queries"), ((4, 12, 1, 5), "5 heads")])
def test_wrong_sizes_are_named(sizes, words):
    with pytest.raises(UserError, match=words):
        QueryResampler(*sizes)
