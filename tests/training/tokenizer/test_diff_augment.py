"""DiffAug: golden outputs for recorded draws, and draws that depend on (seed, step, call, sample) alone."""

import re

import pytest
import torch

from open_unitok.training.tokenizer.diff_augment import Draws, augment, blurred, draw


def test_golden_outputs(values):
    cases = [name.removesuffix(".out") for name in values if re.fullmatch(r"aug.*\.out", name)]
    assert len(cases) == 7
    for case in cases:
        size, probability, cutout, blur = re.fullmatch(
            r"aug\.(\d+)\.p(-?[\d.]+)\.c([\d.]+)\.b([\d.]+)", case
        ).groups()
        draws = Draws(values[f"{case}.rand3"], values[f"{case}.rand7"])
        found = augment(values[f"aug.{size}.in"], draws, float(probability), float(cutout), float(blur))
        torch.testing.assert_close(found, values[f"{case}.out"], rtol=0, atol=1e-6, msg=case)


def test_blur_follows_its_strength(values, numbers):
    """The published code kept the kernel of the same radius; the kernel must follow sigma."""
    image = values["aug.64.in"]
    fresh, stale = blurred(image, 0.68), blurred(image, 0.70)
    wanted = numbers["diffaug_blur_cache"]["maxdiff_stale_vs_fresh"]
    assert (fresh - stale).abs().max().item() == pytest.approx(wanted, rel=1e-3)


def test_blur_of_small_images():
    assert torch.isfinite(blurred(torch.rand(1, 3, 16, 4), 1.0)).all()
    image = torch.rand(1, 3, 32, 32)
    assert blurred(image, 0.0) is image
    torch.testing.assert_close(blurred(torch.ones(1, 3, 16, 16), 1.0), torch.ones(1, 3, 16, 16))


def test_draws_are_those_of_the_sample():
    whole = draw(3, 7, "real", range(6))
    part = draw(3, 7, "real", [4, 1])
    assert torch.equal(part.which, whole.which)
    assert torch.equal(part.amounts, whole.amounts[:, [4, 1]])
    assert whole.amounts.shape == (7, 6, 1, 1)
    for other in (draw(4, 7, "real", [4]), draw(3, 8, "real", [4]), draw(3, 7, "fake", [4])):
        assert not torch.equal(other.amounts, whole.amounts[:, 4:5])
    before = torch.get_rng_state()
    draw(3, 7, "real", range(2))
    assert torch.equal(before, torch.get_rng_state())


def test_batch_is_one_by_one_and_not_square():
    image, draws = torch.rand(3, 3, 24, 40, requires_grad=True), draw(0, 0, "real", range(3))
    together = augment(image, draws, blur=0.3)
    for i in range(3):
        alone = augment(image[i : i + 1], draw(0, 0, "real", [i]), blur=0.3)
        torch.testing.assert_close(alone[0], together[i])
    together.sum().backward()
    assert image.grad.isfinite().all() and image.grad.abs().sum() > 0
    half = augment(image.detach().bfloat16(), draws)
    assert half.dtype == torch.float32
