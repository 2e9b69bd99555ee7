"""DiffAugment: differentiable translation, colour and cutout of the discriminator's inputs, after a blur
(arXiv 2006.10738, section 3; blur as in StyleGAN-XL, arXiv 2202.00273, section 3.2).

B batch, H and W rows and columns.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.seeding import torch_generator, uniform_per_sample

TRANSLATION = 1 / 8  # largest translation, as a share of each side
CUTOUT = 0.2  # side of the blanked box, as a share of each side

Crop = tuple[int, int] | None  # (top, left) of the crop to a multiple of the patch size; None: resize instead


class AugmentationNoise(NamedTuple):
    """Uniform numbers in [0, 1) that determine one call of `augment`."""

    applied: Tensor  # (3,): translation, colour, cutout are applied where this is at most the probability
    amounts: Tensor  # (7, B, 1, 1): translation y, x; brightness, saturation, contrast; cutout y, x


class View(NamedTuple):
    """Random augmentation and crop parameters of one discriminator pass."""

    noise: AugmentationNoise
    crop: Crop


def sample_noise(seed: int, step: int, name: str, samples: Sequence[int]) -> AugmentationNoise:
    """Noise of one call, keyed by (seed, step, name, sample): an image's does not depend on its batch.

    Args:
        name: of the pass within a step ("fake", "real", ...).
        samples: numbers of the images in the global batch, so that any split over ranks samples the same.
    """
    applied = torch.rand(3, generator=torch_generator(seed, "diffaug", step, name))
    amounts = uniform_per_sample((7,), samples, seed, "diffaug", step, name)
    return AugmentationNoise(applied, amounts.view(7, -1, 1, 1))


def augment(
    pixels: Tensor,
    noise: AugmentationNoise,
    probability: float = 1.0,
    cutout: float = CUTOUT,
    blur: float = 0.0,
) -> Tensor:
    """(B, 3, H, W) -> same, float32, differentiable.

    Args:
        noise: see `sample_noise`.
        probability: of each augmentation; a negative one means its absolute value, without cutout.
        cutout: side of the blanked box, as a share of each side.
        blur: strength from 0 (none) to 1.
    """
    pixels = gaussian_blur(pixels.float(), blur)
    translate, recolour, blank = (noise.applied <= abs(probability)).tolist()
    amounts = noise.amounts.to(device=pixels.device, dtype=torch.float32)
    if translate:
        pixels = _translate(pixels, amounts[0:2])
    if recolour:
        pixels = _colour(pixels, amounts[2:5])
    if blank and probability > 0 and cutout > 0:
        pixels = _cutout(pixels, amounts[5:7], cutout)
    return pixels


def gaussian_blur(pixels: Tensor, strength: float) -> Tensor:
    """Separable blur with sigma = strength * sqrt(H/2); a no-op where the kernel would be one pixel."""
    sigma = math.sqrt(pixels.shape[-2] / 2) * strength
    radius = math.floor(3 * sigma)
    if radius < 1:
        return pixels
    # reflection padding must be smaller than the image
    reach = min(radius, min(pixels.shape[-2:]) - 1)
    offsets = torch.arange(-reach, reach + 1, device=pixels.device, dtype=torch.float32)
    # 2^-x^2 as in StyleGAN, not exp(-x^2 / 2)
    kernel = torch.exp2(-(offsets / sigma).square())
    kernel = kernel / kernel.sum()
    channels = pixels.shape[1]
    padded = F.pad(pixels, (reach, reach, reach, reach), mode="reflect")
    with torch.autocast(pixels.device.type, enabled=False):
        rows = F.conv2d(padded, kernel.view(1, 1, -1, 1).repeat(channels, 1, 1, 1), groups=channels)
        return F.conv2d(rows, kernel.view(1, 1, 1, -1).repeat(channels, 1, 1, 1), groups=channels)


def _translate(pixels: Tensor, amounts: Tensor) -> Tensor:
    """Translate each image by up to an eighth of its sides, padding with 0; `amounts` is (2, B, 1, 1)."""
    batch, channels, height, width = pixels.shape
    reach = [round(side * TRANSLATION) for side in (height, width)]
    padded = F.pad(pixels, (reach[1], reach[1], reach[0], reach[0]))
    rows, columns = (
        torch.arange(side, device=pixels.device) + torch.floor(amount.view(-1, 1) * (2 * most + 1)).long()
        for side, amount, most in zip((height, width), amounts, reach)
    )
    # advanced indexing per image would need a loop: gather rows, then columns
    moved = padded.gather(2, rows.view(batch, 1, height, 1).expand(-1, channels, -1, padded.shape[3]))
    return moved.gather(3, columns.view(batch, 1, 1, width).expand(-1, channels, height, -1))


def _colour(pixels: Tensor, amounts: Tensor) -> Tensor:
    """Brightness, then saturation, then contrast; `amounts` is (3, B, 1, 1)."""
    brightness, saturation, contrast = amounts.unsqueeze(2)  # (B, 1, 1, 1) each
    # brightness adds up to +-0.5; saturation is scaled by [0, 2), contrast by [0.5, 1.5)
    pixels = pixels + (brightness - 0.5)
    grey = pixels.mean(dim=1, keepdim=True)
    pixels = (pixels - grey) * (2 * saturation) + grey
    level = pixels.mean(dim=(1, 2, 3), keepdim=True)
    return (pixels - level) * (contrast + 0.5) + level


def _cutout(pixels: Tensor, amounts: Tensor, share: float) -> Tensor:
    """Blank a box of `share` of each side around a random centre; `amounts` is (2, B, 1, 1)."""
    inside = []
    for side, amount in zip(pixels.shape[-2:], amounts):
        size = round(share * side)
        centre = torch.floor(amount.view(-1, 1) * (side + (1 - size % 2)))
        first = centre - size // 2
        last = first + size - 1
        index = torch.arange(side, device=pixels.device)
        # both ends are clamped: a box at the edge shrinks, but keeps at least one row and column
        inside.append((index >= first.clamp(0, side - 1)) & (index <= last.clamp(0, side - 1)))
    box = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return pixels.masked_fill(box, 0.0)
