"""Differentiable augmentation of what the discriminator sees: blur, shift, colour, cutout (DiffAugment, arXiv
2006.10738, section 3; blur as in StyleGAN-XL, arXiv 2202.00273, section 3.2).

B batch, H and W rows and columns.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.seeding import torch_generator, uniform_per_sample

SHIFT = 1 / 8  # largest shift, as a share of each side
CUTOUT = 0.2  # side of the blanked box, as a share of each side


class Draws(NamedTuple):
    """Uniform numbers in [0, 1) that decide everything about one call."""

    which: Tensor  # (3,): shift, colour, cutout are applied where this is at most the probability
    amounts: Tensor  # (7, B, 1, 1): shift y, x; brightness, saturation, contrast; cutout y, x


def draw(seed: int, step: int, call: str, samples: Sequence[int]) -> Draws:
    """The draws of one call: a sample's depend on (seed, step, call, its number) and not on its neighbours.

    Args:
        call: names the use within a step ("fake", "real", ...), each of which draws anew.
        samples: numbers of the images in the global batch, so that any split over ranks draws the same.
    """
    which = torch.rand(3, generator=torch_generator(seed, "diffaug", step, call))
    return Draws(which, uniform_per_sample((7,), samples, seed, "diffaug", step, call).view(7, -1, 1, 1))


def augment(
    pixels: Tensor, draws: Draws, probability: float = 1.0, cutout: float = CUTOUT, blur: float = 0.0
) -> Tensor:
    """(B, 3, H, W) -> same, float32, differentiable.

    Args:
        draws: see `draw`.
        probability: of each kind; a negative one means its absolute value, without cutout.
        cutout: side of the blanked box, as a share of each side.
        blur: strength from 0 (none) to 1, faded out early in the discriminator's training.
    """
    pixels = blurred(pixels.float(), blur)
    which = (draws.which <= abs(probability)).tolist()
    amounts = draws.amounts.to(device=pixels.device, dtype=torch.float32)
    if which[0]:
        pixels = _shift(pixels, amounts[0:2])
    if which[1]:
        pixels = _colour(pixels, amounts[2:5])
    if which[2] and probability > 0 and cutout > 0:
        pixels = _cut(pixels, amounts[5:7], cutout)
    return pixels


def blurred(pixels: Tensor, strength: float) -> Tensor:
    """A Gaussian-like blur, sigma = strength * sqrt(H/2); nothing where its kernel would be one pixel."""
    sigma = math.sqrt(pixels.shape[-2] / 2) * strength
    radius = math.floor(3 * sigma)
    if radius < 1:
        return pixels
    # reflecting needs more pixels than the radius
    reach = min(radius, min(pixels.shape[-2:]) - 1)
    offsets = torch.arange(-reach, reach + 1, device=pixels.device, dtype=torch.float32)
    kernel = torch.exp2(-(offsets / sigma).square())
    kernel = kernel / kernel.sum()
    channels = pixels.shape[1]
    padded = F.pad(pixels, (reach, reach, reach, reach), mode="reflect")
    with torch.autocast(pixels.device.type, enabled=False):
        rows = F.conv2d(padded, kernel.view(1, 1, -1, 1).repeat(channels, 1, 1, 1), groups=channels)
        return F.conv2d(rows, kernel.view(1, 1, 1, -1).repeat(channels, 1, 1, 1), groups=channels)


def _shift(pixels: Tensor, amounts: Tensor) -> Tensor:
    """Move each image by up to an eighth of its sides; what comes in is 0. `amounts` is (2, B, 1, 1)."""
    batch, channels, height, width = pixels.shape
    reach = [round(side * SHIFT) for side in (height, width)]
    padded = F.pad(pixels, (reach[1], reach[1], reach[0], reach[0]))
    rows, columns = (
        torch.arange(side, device=pixels.device) + torch.floor(amount.view(-1, 1) * (2 * most + 1)).long()
        for side, amount, most in zip((height, width), amounts, reach)
    )
    moved = padded.gather(2, rows.view(batch, 1, height, 1).expand(-1, channels, -1, padded.shape[3]))
    return moved.gather(3, columns.view(batch, 1, 1, width).expand(-1, channels, height, -1))


def _colour(pixels: Tensor, amounts: Tensor) -> Tensor:
    """Brightness, saturation and contrast, one after the other; `amounts` is (3, B, 1, 1)."""
    brightness, saturation, contrast = amounts.unsqueeze(2)  # (B, 1, 1, 1) each
    pixels = pixels + (brightness - 0.5)
    grey = pixels.mean(dim=1, keepdim=True)
    pixels = (pixels - grey) * (2 * saturation) + grey
    level = pixels.mean(dim=(1, 2, 3), keepdim=True)
    return (pixels - level) * (contrast + 0.5) + level


def _cut(pixels: Tensor, amounts: Tensor, share: float) -> Tensor:
    """Blank a box of `share` of each side around a random centre; `amounts` is (2, B, 1, 1)."""
    inside = []
    for side, amount in zip(pixels.shape[-2:], amounts):
        size = round(share * side)
        centre = torch.floor(amount.view(-1, 1) * (side + (1 - size % 2)))
        first = centre - size // 2
        last = first + size - 1
        place = torch.arange(side, device=pixels.device)
        # each coordinate of the box is clamped on its own: a box at the edge shrinks, but never to nothing
        inside.append((place >= first.clamp(0, side - 1)) & (place <= last.clamp(0, side - 1)))
    box = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return pixels.masked_fill(box, 0.0)
