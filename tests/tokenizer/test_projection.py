"""The projections: cached equals uncached, for any widths."""

import pytest
import torch

from open_unitok.tokenizer import AttentionProjection, KVCache, LinearProjection, build_projection


@pytest.mark.parametrize("widths", [(16, 64), (64, 16), (24, 40), (40, 24)])
@pytest.mark.parametrize("pieces", [[1] * 6, [2, 1, 3], [6]])
def test_cached_equals_uncached(widths, pieces):
    torch.manual_seed(0)
    heads = max(widths) // 8
    projection = AttentionProjection(*widths, heads=heads, causal=True)
    hidden = torch.randn(3, 6, widths[0])
    cache = KVCache(6)
    with torch.no_grad():
        steps = torch.cat([projection(piece, cache) for piece in hidden.split(pieces, dim=1)], dim=1)
        torch.testing.assert_close(steps, projection(hidden), rtol=0, atol=1e-6)
        torch.testing.assert_close(projection(hidden[:, :2]), projection(hidden)[:, :2], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="holds up to 6 tokens, got 7"), torch.no_grad():
        projection(hidden[:, :1], cache)


def test_a_cache_needs_a_causal_projection():
    projection = AttentionProjection(16, 64, heads=4)
    with pytest.raises(ValueError, match="causal"):
        projection(torch.randn(1, 2, 16), KVCache(4))
    hidden = torch.randn(1, 5, 16)
    assert not torch.allclose(projection(hidden)[:, :2], projection(hidden[:, :2]), atol=1e-4)


def test_heads_must_divide():
    with pytest.raises(ValueError, match="5 heads do not divide the width 64"):
        AttentionProjection(16, 64, heads=5)


def test_linear():
    projection = build_projection("linear", 16, 64, heads=4, causal=True)
    assert isinstance(projection, LinearProjection)
    hidden = torch.randn(2, 3, 16)
    assert torch.equal(projection(hidden, KVCache(3)), projection(hidden))
