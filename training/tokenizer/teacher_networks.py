"""Frozen networks whose features a tokenizer learns to predict: any vision model, DINOv2, any callable.

B images, n patches of the teacher's own grid, D width of its features.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_unitok.core.errors import UserError
from open_unitok.tokenizer.encoders.vision_tower import VisionTower, load_projected_tower, load_tower
from open_unitok.tokenizer.frozen import efficientnet
from open_unitok.tokenizer.frozen.dinov2 import DINOv2

from .config import TeacherOptions

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class TeacherFeatures(NamedTuple):
    """Features of a batch of images, float32, without gradient."""

    whole: Tensor  # (B, D): the class token, or the mean of the patches of a network without one
    patches: Tensor  # (B, D, rows, columns)


class Teacher:
    """A frozen network behind its own resizing and normalisation.

    Args:
        network: normalised (B, 3, S, S) images -> (B, prefix + n, D) tokens, class token first, or
            (B, D, rows, columns); n is the largest square number, or `patch` says it.
        width: D.
        image_size: S, the side in pixels to which images are resized.
        mean, std: of the network's input, for pixels in [0, 1].
        resize: "bicubic", "nearest" (as FQGAN) or another mode of torch's interpolate.
        patch: side of a patch in pixels, or None.
    """

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        width: int,
        image_size: int,
        mean: tuple[float, ...] = _IMAGENET[0],
        std: tuple[float, ...] = _IMAGENET[1],
        resize: str = "bicubic",
        patch: int | None = None,
    ) -> None:
        self.network, self.width, self.image_size = network, width, image_size
        self.mean, self.std = (torch.tensor(value).view(1, 3, 1, 1) for value in (mean, std))
        self.resize, self.patch = resize, patch
        if isinstance(network, nn.Module):
            network.requires_grad_(False).eval()

    def to(self, device: torch.device) -> "Teacher":
        if isinstance(self.network, nn.Module):
            self.network.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> TeacherFeatures:
        """(B, 3, H, W) pixels in [-1, 1] -> features.

        Raises:
            UserError: the network's output has another shape than it must have.
        """
        image = (pixels.float() + 1) / 2
        size = (self.image_size, self.image_size)
        if image.shape[-2:] != size:
            smooth = {"align_corners": False} if self.resize in ("bicubic", "bilinear") else {}
            image = F.interpolate(image, size=size, mode=self.resize, **smooth)
        features = self.network((image - self.mean) / self.std).float()
        if features.dim() == 4 and features.shape[1] == self.width:
            return TeacherFeatures(features.mean(dim=(2, 3)), features)
        if features.dim() != 3 or features.shape[2] != self.width:
            raise UserError(
                f"The teacher returns features of shape {tuple(features.shape)}: expected (images, tokens, "
                f"{self.width}) or (images, {self.width}, rows, columns)."
            )
        count = features.shape[1]
        side = self.image_size // self.patch if self.patch else math.isqrt(count)
        if side * side > count:
            raise UserError(f"The teacher returns {count} tokens: a grid of {side} x {side} needs more.")
        prefix = count - side * side  # class token and registers
        patches = features[:, prefix:].transpose(1, 2).unflatten(2, (side, side))
        whole = features[:, 0] if prefix else patches.mean(dim=(2, 3))
        return TeacherFeatures(whole, patches)


def build_teacher(options: TeacherOptions) -> Teacher:
    """The frozen network that the config names.

    Raises:
        UserError: there is no such model, or an option does not fit it.
    """
    network = "efficientnet" if options.model == efficientnet.LITE0 else options.network
    return TEACHERS[network](options)


def _from_transformers(options: TeacherOptions) -> Teacher:
    """A vision model, or the vision half of a CLIP, by path or hub id."""
    load = load_projected_tower if options.projected else load_tower
    tower = load(
        options.model or "", "teacher.model", layer=options.layer, mean=options.mean, std=options.std
    )
    network = _Tokens(tower)
    size = options.image_size or tower.image_size
    return Teacher(network, tower.width, size, tower.mean, tower.std, options.resize, tower.tower_patch)


class _Tokens(nn.Module):
    """A tower as normalised images -> tokens, class token first."""

    def __init__(self, tower: VisionTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, image: Tensor) -> Tensor:
        return self.tower.all_tokens(image)


def _check_layer(layer: int | None, depth: int) -> None:
    if layer is not None and layer < -depth:
        raise UserError(f"teacher.layer is {layer}: this network has {depth} blocks, -1 to -{depth}.")


def _from_dinov2(options: TeacherOptions) -> Teacher:
    """The DINOv2 of the discriminator, with its final norm."""
    dino = DINOv2.from_file(options.model, norm=True)
    size = options.image_size or 224 // dino.patch * dino.patch
    if size % dino.patch:
        raise UserError(
            f"teacher.image_size is {size}: it must be a multiple of DINOv2's patch, {dino.patch}."
        )
    _check_layer(options.layer, dino.depth)
    block = (options.layer or -1) % dino.depth
    network = _DINOv2Tokens(dino, block, final=options.layer is None)
    mean, std = options.mean or _IMAGENET[0], options.std or _IMAGENET[1]
    return Teacher(network, dino.width, size, mean, std, options.resize, dino.patch)


def _from_efficientnet(options: TeacherOptions) -> Teacher:
    """EfficientNet-Lite0 of PyPI: its map of stride 16, pooled for a contrast."""
    for name in ("layer", "projected"):
        if getattr(options, name):
            raise UserError(f"teacher.{name}: {efficientnet.LITE0} has one map of features, omit it.")
    size = options.image_size or efficientnet.IMAGE_SIZE
    if size % efficientnet.STRIDE:
        raise UserError(f"teacher.image_size is {size}: it must be a multiple of {efficientnet.STRIDE}.")
    mean, std = options.mean or efficientnet.MEAN, options.std or efficientnet.STD
    return Teacher(
        efficientnet.EfficientNetLite0(), efficientnet.LITE0_WIDTH, size, mean, std, options.resize
    )


class _DINOv2Tokens(nn.Module):
    def __init__(self, dino: DINOv2, block: int, final: bool) -> None:
        super().__init__()
        self.dino, self.block, self.final = dino, block, final

    def forward(self, image: Tensor) -> Tensor:
        (hidden,) = self.dino(image, (self.block,))
        return self.dino.norm(hidden) if self.final and self.dino.norm is not None else hidden


# `teacher.network`; an own network is one entry, with the features of `Teacher`.
TEACHERS: dict[str, Callable[[TeacherOptions], Teacher]] = {
    "transformers": _from_transformers,
    "dinov2": _from_dinov2,
    "efficientnet": _from_efficientnet,
}
