"""all_gather and all_reduce with gradients; no-ops on one rank.

torch.distributed.nn.functional has both, but torch 2.13 deprecates it (a FutureWarning per call) in favour of
a private module, and on gloo the backward pass of its all_gather sends one scatter per rank.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from open_unitok.core import distributed


def all_gather_with_grad(tensor: Tensor) -> Tensor:
    """(B, ...) of every rank, the same B on each -> (ranks * B, ...) in rank order.

    A rank's gradient is the sum over ranks of the gradients of its part: with the mean of the ranks' losses,
    that is the gradient of one process with the whole batch.
    """
    return tensor if distributed.world_size() == 1 else _AllGather.apply(tensor)


def all_reduce_with_grad(tensor: Tensor) -> Tensor:
    """Sum over ranks; gradients are summed over ranks too."""
    return tensor if distributed.world_size() == 1 else _AllReduce.apply(tensor)


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Mean over ranks, with gradients; see `all_reduce_with_grad`."""
    return all_reduce_with_grad(tensor) / distributed.world_size()


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(distributed.world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # this is a reduce-scatter, which not every version of gloo has: all-reduce and take this rank's chunk
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.chunk(distributed.world_size())[distributed.rank()]


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # every rank's output depends on this rank's input: sum the gradients of all outputs
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient)
        return gradient
