"""Discriminators: small heads on frozen DINOv2 features, as published, or convolutions from scratch (arXiv
2502.20321, section 4.1; the heads follow StyleGAN-T, arXiv 2301.09515, section 3.2).

Interface: `discriminator(pixels, crop) -> logits (B, M)`, positive for real images, and
`discriminator.sample_crop(height, width, generator) -> crop`. B batch, D feature width, N positions.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_unitok.core import distributed
from open_unitok.core.errors import UserError, did_you_mean
from open_unitok.tokenizer.frozen.dinov2 import DINOv2

from ..core.collectives import all_reduce_with_grad
from .diff_augment import Crop

DEPTHS = (0, 2, 5, 8, 11)  # DINOv2 blocks whose outputs get a head
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as DINOv2 expects
_NORM_EPS = 1e-6
_VIRTUAL_BATCH = 8  # images per group of "bn"


class Discriminator(nn.Module):
    """Base class; a subclass implements `forward(pixels, crop)`: (B, 3, H, W) in [-1, 1] to (B, M) logits."""

    def sample_crop(self, height: int, width: int, generator: torch.Generator) -> Crop:
        """A crop for a whole batch of images of this size."""
        return None


class DinoDiscriminator(Discriminator):
    """One head per chosen block of a frozen DINOv2; images are cropped or resized to its patch size.

    The DINOv2 is not in state_dict() and parameters(), but moves with `.to(...)`.

    Args:
        norm: "gn" (published), "bn" (batch norm over groups of up to 8 images), "sbn" (over all ranks).
    """

    x_scale: Tensor
    x_shift: Tensor

    def __init__(
        self,
        dino: DINOv2,
        depths: Sequence[int] = DEPTHS,
        norm: str = "gn",
        spectral_norm: bool = False,
        kernel: int = 9,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise UserError(f"{norm!r} is not a discriminator norm.{did_you_mean(norm, NORMS)}")
        if max(depths) >= dino.depth:
            raise UserError(f"depths = {tuple(depths)}: this DINOv2 has blocks 0 to {dino.depth - 1} only.")
        self._frozen = [dino.requires_grad_(False).eval()]  # a list hides it from nn.Module
        self.depths = tuple(sorted(depths))
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (_MEAN, _STD))
        self.register_buffer("x_scale", 0.5 / std)
        self.register_buffer("x_shift", (0.5 - mean) / std)
        self.heads = nn.ModuleList(_head(dino.width, kernel, NORMS[norm]) for _ in self.depths)
        _init_convolutions(self)
        if spectral_norm:
            for module in list(self.heads.modules()):
                if isinstance(module, nn.Conv1d):
                    nn.utils.spectral_norm(module)

    @property
    def dino(self) -> DINOv2:
        """The frozen feature extractor."""
        return self._frozen[0]

    def forward(self, pixels: Tensor, crop: Crop = None) -> Tensor:
        # from [-1, 1] to ImageNet's normalisation
        image = self._fit(pixels.float(), crop) * self.x_scale + self.x_shift
        logits = []
        for hidden, head in zip(self.dino(image, self.depths), self.heads):
            # the class token is added to every patch token
            features = hidden[:, 1:] + hidden[:, :1]
            logits.append(head(features.transpose(1, 2)).flatten(1))
        return torch.cat(logits, dim=1).float()

    def sample_crop(self, height: int, width: int, generator: torch.Generator) -> Crop:
        """A random crop with probability 1/2, if neither side is a multiple of the patch size; else None."""
        probability, top, left = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        spare = height % self.dino.patch, width % self.dino.patch
        if probability >= 0.5 or min(spare) == 0:
            return None
        return int(top * (spare[0] + 1)), int(left * (spare[1] + 1))

    def _fit(self, pixels: Tensor, crop: Crop) -> Tensor:
        """Crop or resize to the next smaller multiple of the patch size."""
        patch = self.dino.patch
        height, width = (side // patch * patch for side in pixels.shape[-2:])
        if 0 in (height, width):
            raise UserError(
                f"Images of {tuple(pixels.shape[-2:])} pixels: the discriminator needs {patch} or more."
            )
        if (height, width) == tuple(pixels.shape[-2:]):
            return pixels
        if crop is not None:
            top, left = crop
            return pixels[..., top : top + height, left : left + width]
        return F.interpolate(pixels, size=(height, width), mode="area")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DinoDiscriminator":
        # `.to()`, `.half()`, ... end in _apply, which does not reach a module in a list
        self.dino._apply(fn, recurse)
        return super()._apply(fn, recurse)


class PatchDiscriminator(Discriminator):
    """PatchGAN: strided convolutions trained from scratch, for runs without DINOv2 weights.

    After pix2pix (arXiv 1611.07004, section 3.2.2), with group norm, so that images are independent.

    Args:
        width: channels of the first layer; they double with each layer, up to 8 x width.
        layers: convolutions of stride 2 after the first.
    """

    def __init__(self, width: int = 32, layers: int = 3) -> None:
        super().__init__()
        if width < 1 or layers < 1:
            raise UserError(f"discriminator: width and layers must be 1 or more, got {width} and {layers}.")
        blocks: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for layer in range(layers):
            wider = min(width * 2 ** (layer + 1), width * 8)
            blocks += [
                nn.Conv2d(channels, wider, 4, stride=2, padding=1),
                nn.GroupNorm(math.gcd(8, wider), wider, eps=_NORM_EPS),
                nn.LeakyReLU(0.2),
            ]
            channels = wider
        self.min_size = 2**layers
        self.layers = nn.Sequential(*blocks, nn.Conv2d(channels, 1, 3, padding=1))
        _init_convolutions(self)

    def forward(self, pixels: Tensor, crop: Crop = None) -> Tensor:
        if min(pixels.shape[-2:]) < self.min_size:
            raise UserError(
                f"Images of {tuple(pixels.shape[-2:])} pixels: this discriminator needs {self.min_size} or "
                "more; use fewer layers."
            )
        return self.layers(pixels.float()).flatten(1).float()


def build_discriminator(
    kind: str,
    dino: str | Path | None = None,
    norm: str = "gn",
    spectral_norm: bool = False,
    width: int = 32,
    layers: int = 3,
) -> Discriminator:
    """A discriminator of kind "dino" (with the DINOv2 weights at `dino`) or "patch" (from scratch).

    Raises:
        UserError: unknown kind or norm; the DINOv2 file is missing.
    """
    if kind == "dino":
        return DinoDiscriminator(DINOv2.from_file(dino), norm=norm, spectral_norm=spectral_norm)
    if kind == "patch":
        return PatchDiscriminator(width, layers)
    raise UserError(f"{kind!r} is not a kind of discriminator.{did_you_mean(kind, ('dino', 'patch'))}")


def _init_convolutions(module: nn.Module) -> None:
    """Published initialisation: Xavier-normal convolutions of gain 0.5, zero biases; norms are 1 and 0."""
    for part in module.modules():
        if isinstance(part, (nn.Conv1d, nn.Conv2d)):
            nn.init.xavier_normal_(part.weight, gain=0.5)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


# ---- parts of a head -------------------------------------------------------------------------------------


class _Residual(nn.Module):
    """(fn(x) + x) / sqrt(2)."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.fn = nn.Sequential(*parts)

    def forward(self, features: Tensor) -> Tensor:
        # the factor keeps the variance of a sum of two independent terms
        return (self.fn(features) + features) * 2**-0.5


class GroupedBatchNorm(nn.Module):
    """Batch norm within ceil(B/8) equal groups, without running statistics; (B, D, N) -> same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, features: Tensor) -> Tensor:
        batch, groups = features.shape[0], math.ceil(features.shape[0] / _VIRTUAL_BATCH)
        if batch % groups:
            raise UserError(
                f"discriminator norm 'bn' cannot split {batch} images into {groups} equal groups: use a "
                f"batch per rank that is a multiple of {_VIRTUAL_BATCH}, or norm 'gn'."
            )
        grouped = features.float().unflatten(0, (groups, -1))
        mean = grouped.mean(dim=(1, 3), keepdim=True)
        variance = grouped.var(dim=(1, 3), keepdim=True, unbiased=False)
        normal = ((grouped - mean) * (variance + _NORM_EPS).rsqrt()).flatten(0, 1)
        return (normal * self.weight[:, None] + self.bias[:, None]).to(features.dtype)


class RankBatchNorm(nn.BatchNorm1d):
    """Batch norm over the images of all ranks in training, running statistics in evaluation.

    torch's SyncBatchNorm runs on GPUs only.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or distributed.world_size() == 1:
            return super().forward(input)
        features = input.float()
        # one all-reduce for sum, sum of squares and count
        count = features.new_tensor([features.shape[0] * features.shape[2]])
        sums = torch.cat((features.sum(dim=(0, 2)), features.square().sum(dim=(0, 2)), count))
        total, squares, count = all_reduce_with_grad(sums).split((self.num_features, self.num_features, 1))
        mean = total / count
        # E[x^2] - E[x]^2 can be slightly negative in fp32
        variance = (squares / count - mean.square()).clamp_min(0)
        self._update_running_statistics(mean.detach(), (variance * count / (count - 1).clamp_min(1)).detach())
        normal = (features - mean[:, None]) * (variance + self.eps).rsqrt()[:, None]
        return (normal * self.weight[:, None] + self.bias[:, None]).to(input.dtype)

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, variance: Tensor) -> None:
        assert self.momentum is not None and self.running_mean is not None and self.running_var is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "gn": lambda width: nn.GroupNorm(32, width, eps=_NORM_EPS),
    "bn": GroupedBatchNorm,
    "sbn": lambda width: RankBatchNorm(width, eps=_NORM_EPS),
}


def _head(width: int, kernel: int, norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """(B, D, N) features -> (B, 1, N) logits."""

    def layer(size: int) -> list[nn.Module]:
        # circular padding, as published: patch tokens are treated as a ring
        conv = nn.Conv1d(
            width, width, size, padding=size // 2, padding_mode="circular" if size > 1 else "zeros"
        )
        return [conv, norm(width), nn.LeakyReLU(0.2)]

    return nn.Sequential(nn.Sequential(*layer(1)), _Residual(*layer(kernel)), nn.Conv1d(width, 1, 1))
