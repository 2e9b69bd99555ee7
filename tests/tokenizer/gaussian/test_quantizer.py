"""Gaussians as tokens: features by an inner quantiser, geometry continuous or by levels."""

import math

import pytest
import torch

from open_unitok.core.errors import UserError
from open_unitok.tokenizer.quantizers import QUANTIZERS
from open_unitok.tokenizer.quantizers.gaussian import GaussianQuantizer, activate, geometry_codes

LEVELS = [8, 8, 4, 3, 2]
INNER = {
    "nearest_ema": {},
    "ema": {},
    "nearest": {},
    "ibq": {},
    "multi_codebook": {},
    "attention": {},
    "shared_index": {"block_widths": [2, 2]},
}


def build(books=1, levels=LEVELS, inner="nearest_ema", **options) -> GaussianQuantizer:
    torch.manual_seed(0)
    count = books + (5 if levels else 0)
    return GaussianQuantizer(count, 16, 4 * books + 5, inner, options or None, levels)


def latents(width=9, seed=0):
    return 2 * torch.randn(2, 6, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("books", [1, 2])
@pytest.mark.parametrize("inner", INNER)
def test_a_code_has_its_own_columns_of_the_latent(inner, books):
    """Sum of one row of the table per code = `embed` = the quantised latents."""
    quantizer = build(books, inner=inner, **INNER[inner]).eval()
    z = latents(4 * books + 5)
    codes, out = quantizer.encode(z), quantizer(z)
    assert quantizer.code_sizes == [16] * books + LEVELS and codes.shape == (2, 6, books + 5)
    assert torch.equal(out.codes, codes)
    table = quantizer.code_table()
    assert table.shape == (books + 5, 16, 4 * books + 5)
    rows = torch.stack([table[k][codes[..., k]] for k in range(books + 5)], dim=-2)
    torch.testing.assert_close(rows.sum(dim=-2), quantizer.embed(codes), rtol=0, atol=1e-6)
    torch.testing.assert_close(out.quantised, quantizer.embed(codes), rtol=0, atol=2e-6)
    torch.testing.assert_close(quantizer.quantise(z), quantizer.embed(codes), rtol=0, atol=0)


def test_every_other_entry_builds_inside():
    assert {*INNER, "cluster", "library"} <= set(GaussianQuantizer.inner_kinds)
    options = {"kind": "LFQ"}
    fsq = GaussianQuantizer(6, 16, 9, "library", options, LEVELS).eval()
    assert fsq.embed(fsq.encode(latents())).shape == (2, 6, 9)
    with pytest.raises(UserError, match=r"quantizer_options\.inner = 'residual'"):
        build(inner="residual")


def test_the_gradient_passes_straight_through_the_cells():
    """To raw numbers, as through the activation at the middle of the cell."""
    quantizer = build().eval()
    z = latents().requires_grad_()
    quantizer(z).quantised[..., 4:].sum().backward()
    codes = quantizer(z).codes[..., 1:]
    middle = torch.logit((codes + 0.5) / torch.tensor(LEVELS)).requires_grad_()
    activate(middle, quantizer.largest).sum().backward()
    torch.testing.assert_close(z.grad[..., 4:], middle.grad, rtol=1e-4, atol=1e-6)
    assert not z.grad[..., :4].any()


def test_continuous_geometry_reconstructs_but_has_no_codes():
    quantizer = build(levels=None)
    z = latents()
    out = quantizer(z)
    torch.testing.assert_close(out.quantised[..., 4:], activate(z[..., 4:]))
    assert out.codes.shape == (2, 6, 1) and not (quantizer.reads or quantizer.generates)
    torch.testing.assert_close(
        quantizer.eval().quantise(z), quantizer(z).quantised.detach(), rtol=0, atol=2e-6
    )
    line = "continuous geometry, 5 floats a token. Only reconstruct works"
    with pytest.raises(UserError, match=line):
        quantizer.encode(z)
    with pytest.raises(UserError, match=line):
        quantizer.embed(out.codes)
    assert quantizer.code_table() is None


def test_bits_count_the_continuous_numbers():
    assert build(levels=None).bits_per_token == 4 + 5 * 32
    assert build().bits_per_token == pytest.approx(4 + sum(map(math.log2, LEVELS)))


def test_the_largest_scale_falls_from_four_to_three_in_training():
    quantizer = build()
    small = latents()
    small[..., 7:] = -9.0  # scales of .1: the slowest fall
    largest, mean = 4.0, 2.05
    for _ in range(3):
        quantizer(small)
        scale = 0.1 + (largest - 0.1) * (0.5 / torch.tensor([3, 2.0])).mean()  # middles of the lowest cells
        mean = 0.99 * mean + 0.01 * float(scale)
        largest -= 1e-3 * max(mean - (largest + 0.1) / 2, 0.01)
        assert float(quantizer.largest) == pytest.approx(largest, abs=1e-6)
        assert float(quantizer.mean_scale) == pytest.approx(mean, abs=1e-6)
    large = latents()
    large[..., 7:] = 9.0
    before = float(quantizer.largest)
    for _ in range(200):
        quantizer(large)
    assert before - float(quantizer.largest) > 200 * 1.5e-5  # faster than the slowest
    quantizer.largest.fill_(3.000001)
    quantizer(large)
    assert quantizer.largest == 3.0  # and no further
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    quantizer.eval()(large)
    quantizer.train().frozen = True
    quantizer(large)
    assert torch.equal(quantizer.largest, before["largest"])
    assert torch.equal(quantizer.mean_scale, before["mean_scale"])


def test_values_and_table_follow_the_largest_scale():
    quantizer = build().eval()
    codes = quantizer.encode(latents())
    before, table = quantizer.embed(codes), quantizer.code_table()
    quantizer.largest.fill_(3.0)
    after = quantizer.embed(codes)
    assert torch.equal(before[..., :7], after[..., :7]) and (before[..., 7:] > after[..., 7:]).all()
    assert not torch.equal(table, quantizer.code_table())
    assert torch.equal(geometry_codes(latents()[..., 4:], LEVELS), codes[..., 1:])


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((6, 16, 9), {"levels": [8, 8, 4, 3]}, r"levels is \[8, 8, 4, 3\]: expected 5 numbers"),
        ((6, 16, 9), {"levels": [8, 8, 4, 3, 1]}, "expected 5 numbers from 2 to 4096"),
        ((6, 16, 9), {"levels": [8, 8, 4, 3, 2.5]}, "expected 5 numbers from 2 to 4096"),
        ((6, 16, 9), {"levels": [32, 8, 4, 3, 2]}, "codebook_size = 16 must be at least the largest"),
        ((5, 16, 9), {"levels": LEVELS}, "num_codebooks = 5: a token has 5 codes of its geometry"),
        ((6, 16, 5), {"levels": LEVELS}, "codebook_dim = 5: a token has 5 numbers"),
        ((2, 16, 8), {}, "3 feature channels beside 5 of geometry do not divide into 2"),
        ((1, 16, 9), {"inner": "language"}, "quantizer_options.inner = 'language'"),
        ((1, 16, 9), {"inner": "nearest", "inner_options": {"decay": 1}}, "inner_options.decay is not an"),
        ((1, 16, 9), {"inner_options": {"decay": 1.0}}, "decay is 1.0"),
    ],
)
def test_bad_options_are_rejected(sizes, options, message):
    with pytest.raises(UserError, match=message):
        QUANTIZERS["gaussian"](*sizes, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": 5}, "levels is 5: expected 5 numbers"),
        ({"levels": "88432"}, "levels is '88432'"),
        ({"inner": ["ibq"]}, r"inner = \['ibq'\]"),
        ({"inner": {}}, r"inner = \{\}"),
        ({"inner_options": [1]}, r"inner_options is \[1\]"),
    ],
)
def test_options_of_another_type_are_one_line(changes, message):
    options = {"inner": "nearest_ema", "inner_options": None, "levels": LEVELS, **changes}
    with pytest.raises(UserError, match=message):
        GaussianQuantizer(6, 16, 9, options["inner"], options["inner_options"], options["levels"])
