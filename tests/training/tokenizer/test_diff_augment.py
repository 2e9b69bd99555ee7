"""DiffAugment: golden outputs for recorded noise; noise depends on (seed, step, pass, sample) alone."""

import re

import pytest
import torch

from open_unitok.training.tokenizer.diff_augment import (
    AugmentationNoise,
    augment,
    gaussian_blur,
    sample_noise,
)


def test_golden_outputs(values):
    cases = [name.removesuffix(".out") for name in values if re.fullmatch(r"aug.*\.out", name)]
    assert len(cases) == 7
    for case in cases:
        size, probability, cutout, blur = re.fullmatch(
            r"aug\.(\d+)\.p(-?[\d.]+)\.c([\d.]+)\.b([\d.]+)", case
        ).groups()
        noise = AugmentationNoise(values[f"{case}.rand3"], values[f"{case}.rand7"])
        found = augment(values[f"aug.{size}.in"], noise, float(probability), float(cutout), float(blur))
        torch.testing.assert_close(found, values[f"{case}.out"], rtol=0, atol=1e-6, msg=case)


def test_blur_follows_its_strength(values, numbers):
    """The published code kept the kernel of the same radius; the kernel must follow sigma."""
    image = values["aug.64.in"]
    fresh, stale = gaussian_blur(image, 0.68), gaussian_blur(image, 0.70)
    wanted = numbers["diffaug_blur_cache"]["maxdiff_stale_vs_fresh"]
    assert (fresh - stale).abs().max().item() == pytest.approx(wanted, rel=1e-3)


def test_blur_of_small_images():
    assert torch.isfinite(gaussian_blur(torch.rand(1, 3, 16, 4), 1.0)).all()
    image = torch.rand(1, 3, 32, 32)
    assert gaussian_blur(image, 0.0) is image
    torch.testing.assert_close(gaussian_blur(torch.ones(1, 3, 16, 16), 1.0), torch.ones(1, 3, 16, 16))


def test_noise_belongs_to_the_sample():
    whole = sample_noise(3, 7, "real", range(6))
    part = sample_noise(3, 7, "real", [4, 1])
    assert torch.equal(part.applied, whole.applied)
    assert torch.equal(part.amounts, whole.amounts[:, [4, 1]])
    assert whole.amounts.shape == (7, 6, 1, 1)
    for other in (
        sample_noise(4, 7, "real", [4]),
        sample_noise(3, 8, "real", [4]),
        sample_noise(3, 7, "fake", [4]),
    ):
        assert not torch.equal(other.amounts, whole.amounts[:, 4:5])
    before = torch.get_rng_state()
    sample_noise(3, 7, "real", range(2))
    assert torch.equal(before, torch.get_rng_state())


def test_batch_equals_single_images_and_may_be_oblong():
    image, noise = torch.rand(3, 3, 24, 40, requires_grad=True), sample_noise(0, 0, "real", range(3))
    together = augment(image, noise, blur=0.3)
    for i in range(3):
        alone = augment(image[i : i + 1], sample_noise(0, 0, "real", [i]), blur=0.3)
        torch.testing.assert_close(alone[0], together[i])
    together.sum().backward()
    assert image.grad.isfinite().all() and image.grad.abs().sum() > 0
    half = augment(image.detach().bfloat16(), noise)
    assert half.dtype == torch.float32
