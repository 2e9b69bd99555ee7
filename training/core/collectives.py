"""Sums and joins over ranks that a gradient flows through; with one rank they do nothing."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from open_unitok.core import distributed


def joined(tensor: Tensor) -> Tensor:
    """(B, ...) of every rank, the same B on each -> (ranks * B, ...) in rank order.

    Each rank's gradient of all parts is summed and sent back to the part's owner: with the mean of the ranks'
    losses, that is the gradient of one process with the whole batch.
    """
    return tensor if distributed.world_size() == 1 else _Join.apply(tensor)


def summed(tensor: Tensor) -> Tensor:
    """The sum over ranks, the same on each; gradients are summed likewise."""
    return tensor if distributed.world_size() == 1 else _Sum.apply(tensor)


def averaged(tensor: Tensor) -> Tensor:
    """The mean over ranks; see `summed`."""
    return summed(tensor) / distributed.world_size()


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(distributed.world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.chunk(distributed.world_size())[distributed.rank()]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient)
        return gradient
