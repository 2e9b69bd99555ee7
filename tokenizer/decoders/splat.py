"""2D Gaussians rendered to a feature map (GaussianToken, arXiv 2501.15619).

B batch, G Gaussians, C feature channels, (H, W) rows and columns of the map. A pixel (row i, column j) lies
at (j, i), without a shift by half a pixel; centres -1 to 1 are columns 0 to W and rows 0 to H.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..precision import exact_float32

CUT = 1 / 255  # weights below it are dropped
# Weights in memory at once: a block fits into the cache of a core; a GPU takes larger ones.
_BLOCK = {"cpu": 2**18}
_LARGE_BLOCK = 2**24


def splat(
    xy: Tensor, scale: Tensor, rotation: Tensor, features: Tensor, grid: tuple[int, int], cut: float = CUT
) -> Tensor:
    """Sum of Gaussians, each a feature times exp(-d^T Sigma^-1 d / 2), on a background of 0.

    Memory beyond inputs and map is that of one block of weights, in the backward pass as well, where they are
    computed again.

    Args:
        xy: (B, G, 2) centres in [-1, 1].
        scale: (B, G, 2) standard deviations in pixels along the Gaussian's own axes.
        rotation: (B, G) in radians; the first axis points to (cos, -sin), counter-clockwise in the image.
        features: (B, G, C).
        grid: (H, W).
        cut: weights below it are 0, without a gradient; 0 keeps all.

    Returns:
        (B, C, H, W), float32 or, with float64 inputs, float64.
    """
    height, width = grid
    dtype = torch.promote_types(features.dtype, torch.float32)
    xy, scale, rotation, features = (x.to(dtype) for x in (xy, scale, rotation, features))
    columns = torch.arange(width, dtype=dtype, device=xy.device)
    rows = torch.arange(height, dtype=dtype, device=xy.device)
    dx = columns - width * (xy[..., :1] + 1) / 2  # (B, G, W)
    dy = rows - height * (xy[..., 1:] + 1) / 2  # (B, G, H)
    cos, sin = rotation.cos()[..., None], rotation.sin()[..., None]
    first, second = scale[..., :1], scale[..., 1:]
    # Offsets along the two axes in standard deviations, each a column's share plus a row's share:
    # d^T Sigma^-1 d = (u_x + u_y)^2 + (v_x + v_y)^2, without a determinant that could underflow.
    shares = cos * dx / first, -sin * dy / first, sin * dx / second, cos * dy / second
    return _WeightedSum.apply(*shares, features, cut)  # pyright: ignore


class _WeightedSum(torch.autograd.Function):
    """sum_g features_g exp(-((u_x + u_y)^2 + (v_x + v_y)^2) / 2), by blocks of Gaussians."""

    @staticmethod
    def forward(
        ctx: Any, ux: Tensor, uy: Tensor, vx: Tensor, vy: Tensor, features: Tensor, cut: float
    ) -> Tensor:
        ctx.save_for_backward(ux, uy, vx, vy, features)
        ctx.cut = cut
        batch, _, channels = features.shape
        height, width = uy.shape[-1], ux.shape[-1]
        map = features.new_zeros(batch, channels, height * width)
        with exact_float32(features.device):
            for *shares, part in _blocks(ux, uy, vx, vy, features):
                _, _, weights = _weights(shares, cut)
                map.baddbmm_(part.transpose(1, 2), weights.flatten(2))
        return map.unflatten(2, (height, width))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found: list[tuple[Tensor, ...]] = []
        flat = gradient.flatten(2)  # (B, C, H*W)
        with exact_float32(gradient.device):
            for *shares, part in _blocks(*ctx.saved_tensors):
                u, v, weights = _weights(shares, ctx.cut)
                features = weights.flatten(2) @ flat.transpose(1, 2)
                # d exp(-(u^2 + v^2) / 2) = -weight (u du + v dv); a dropped weight is 0
                slope = (part @ flat).view_as(weights).mul_(weights).neg_()
                u, v = u.mul_(slope), v.mul_(slope)
                found.append((u.sum(dim=2), u.sum(dim=3), v.sum(dim=2), v.sum(dim=3), features))
        return *(torch.cat(parts, dim=1) for parts in zip(*found)), None


def _blocks(*tensors: Tensor) -> Any:
    """Yield the tensors (B, G, ...) in blocks of Gaussians."""
    batch, _, width = tensors[0].shape
    limit = _BLOCK.get(tensors[0].device.type, _LARGE_BLOCK)
    step = max(limit // max(batch * width * tensors[1].shape[-1], 1), 1)
    return zip(*(tensor.split(step, dim=1) for tensor in tensors))


def _weights(shares: Sequence[Tensor], cut: float) -> tuple[Tensor, Tensor, Tensor]:
    """u, v and the weights, all (B, G, H, W)."""
    ux, uy, vx, vy = shares
    u = ux[:, :, None, :] + uy[..., None]
    v = vx[:, :, None, :] + vy[..., None]
    weights = torch.addcmul(u.square(), v, v).mul_(-0.5).exp_()
    if cut > 0:
        weights.masked_fill_(weights < cut, 0.0)
    return u, v, weights
