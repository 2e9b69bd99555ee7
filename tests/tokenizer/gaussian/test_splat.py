"""The splat of 2D Gaussians and their geometry, against vectors and closed forms."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from open_unitok.tokenizer.decoders.splat import CUT, splat
from open_unitok.tokenizer.quantizers.gaussian import activate, geometry_codes, raw_of_codes

KEYS = ("xy", "scale", "rotation", "features")


@pytest.fixture(scope="module")
def vectors(golden):
    return load_file(golden / "heads" / "gaussian.safetensors")


@pytest.fixture(scope="module")
def meta(golden):
    return json.loads((golden / "heads" / "gaussian.meta.json").read_text())


def one(scale=(2.0, 2.0), rotation=0.0, xy=(0.0, 0.0), grid=(32, 32), cut=CUT):
    """(H, W) map of a single Gaussian of feature 1, in float64."""
    tensors = (torch.tensor([[values]], dtype=torch.float64) for values in (xy, scale))
    angle = torch.tensor([[rotation]], dtype=torch.float64)
    return splat(*tensors, angle, torch.ones(1, 1, 1, dtype=torch.float64), grid, cut)[0, 0]


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_activation_map_and_gradients_equal_the_vectors(vectors, meta, dtype, error):
    values = activate(vectors["raw"].to(dtype), meta["scale_range"][1], meta["scale_range"][0])
    found = {"xy": values[..., :2], "rotation": values[..., 2], "scale": values[..., 3:]}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), vectors[name], rtol=0, atol=max(error, 1e-12))
    grid = (meta["height"], meta["width"])
    for kind, cut in (("cut", meta["cut"]), ("whole", 0.0)):
        inputs = {name: vectors[name].to(dtype, copy=True).requires_grad_() for name in KEYS}
        map = splat(**inputs, grid=grid, cut=cut)
        torch.testing.assert_close(map.double(), vectors[f"{kind}.map"], rtol=0, atol=error)
        (map * vectors["probe"]).sum().backward()
        for name, tensor in inputs.items():
            wanted = vectors[f"{kind}.grad.{name}"]
            scale = wanted.abs().max().clamp(min=1)  # rounding grows with the value
            torch.testing.assert_close(tensor.grad.double(), wanted, rtol=0, atol=error * float(scale))


def test_geometry_codes_equal_the_vectors(vectors, meta):
    levels, raw = meta["levels"], vectors["raw"]
    codes = geometry_codes(raw, levels)
    assert torch.equal(codes, vectors["fsq.codes"])
    values = activate(raw_of_codes(codes, levels, torch.float64))
    xy, rotation, scale = values[..., :2], values[..., 2], values[..., 3:]
    for name, tensor in (("xy", xy), ("rotation", rotation), ("scale", scale)):
        torch.testing.assert_close(tensor, vectors[f"fsq.{name}"], rtol=0, atol=1e-12)
    map = splat(xy, scale, rotation, vectors["features"].double(), (meta["height"], meta["width"]))
    torch.testing.assert_close(map, vectors["fsq.map"], rtol=0, atol=1e-10)
    # a cell's middle has the cell's own code; the largest raw number the last level
    assert torch.equal(geometry_codes(raw_of_codes(codes, levels), levels), codes)
    ends = geometry_codes(torch.tensor([[-99.0] * 5, [99.0] * 5]), levels)
    assert ends.tolist() == [[0] * 5, [level - 1 for level in levels]]


def test_one_gaussian_has_the_closed_form(vectors):
    wanted, xy = vectors["one.map"], vectors["one.xy"]
    scale, rotation = torch.full((1, 1, 2), 1.5).double(), torch.full((1, 1), 0.7).double()
    map = splat(xy, scale, rotation, torch.ones(1, 1, 1).double(), tuple(wanted.shape[-2:]))
    torch.testing.assert_close(map, wanted, rtol=0, atol=1e-12)
    i, j = torch.meshgrid(torch.arange(12.0).double(), torch.arange(16.0).double(), indexing="ij")
    closed = (-((j - 5) ** 2 + (i - 4) ** 2) / 4.5).exp()
    torch.testing.assert_close(map[0, 0], closed.where(closed >= CUT, 0.0), rtol=0, atol=1e-12)
    # isotropic: no rotation, and nearly the whole mass 2 pi sigma^2 of 25.133
    assert torch.allclose(one(rotation=1.1), one(), rtol=0, atol=1e-15)
    assert float(one().sum()) == pytest.approx(25.028, abs=1e-3)
    assert float(one(cut=0.0).sum()) == pytest.approx(8 * math.pi, abs=1e-3)


def test_a_shift_by_columns_is_exact():
    moved = one(scale=(3.0, 1.5), rotation=0.4, xy=(2 * 2 / 32, 0.0))
    assert torch.equal(moved[:, 2:], one(scale=(3.0, 1.5), rotation=0.4)[:, :-2])


def test_the_long_axis_turns_counter_clockwise_in_the_image():
    map = one(scale=(4.0, 1.0), rotation=math.pi / 4)  # centre at row 16, column 16
    assert float(map[13, 19]) == pytest.approx(0.570, abs=1e-3) and map[19, 19] == 0


def test_gradients_are_the_numeric_ones_without_the_cut():
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(2, 3, 5, dtype=torch.float64, generator=generator).requires_grad_()
    features = torch.randn(2, 3, 2, dtype=torch.float64, generator=generator).requires_grad_()

    def render(raw, features):
        values = activate(raw)
        return splat(values[..., :2], values[..., 3:], values[..., 2], features, (5, 6), cut=0.0)

    assert torch.autograd.gradcheck(render, (raw, features))


def test_blocks_give_the_sum_of_all(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    values = activate(torch.randn(2, 7, 5, generator=generator))
    features = torch.randn(2, 7, 3, generator=generator)

    def run():
        inputs = [values[..., :2], values[..., 3:], values[..., 2], features]
        inputs = [x.clone().requires_grad_() for x in inputs]
        map = splat(*inputs, (9, 11))
        map.square().sum().backward()
        return [map.detach(), *(x.grad for x in inputs)]

    whole = run()
    monkeypatch.setattr("open_unitok.tokenizer.decoders.splat._BLOCK", {"cpu": 2 * 9 * 11 * 2})
    for one_block, blocks in zip(whole, run()):
        torch.testing.assert_close(one_block, blocks, rtol=1e-5, atol=1e-5)


def test_no_weight_is_kept_for_the_backward_pass():
    """What autograd saves is linear in Gaussians plus pixels' sides, not their product."""
    side, count, saved = 64, 200, []
    values = activate(torch.randn(1, count, 5)).requires_grad_()
    features = torch.randn(1, count, 8, requires_grad=True)

    def keep(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        splat(values[..., :2], values[..., 3:], values[..., 2], features, (side, side))
    assert max(saved) == count * side  # offsets along one axis, not count * side * side


def test_the_smallest_scales_keep_finite_gradients():
    values = activate(torch.full((1, 1, 5), -50.0)).requires_grad_()  # the clamp: scales of .1 pixels
    map = splat(values[..., :2], values[..., 3:], values[..., 2], torch.ones(1, 1, 1), (64, 64))
    map.sum().backward()
    assert map.isfinite().all() and values.grad.isfinite().all()
