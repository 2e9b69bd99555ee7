"""Rank and world size, with or without torch.distributed; a single process is rank 0 of 1."""

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def rank() -> int:
    """Global rank of this process."""
    # RANK: torchrun sets it before the process group is initialised
    dist = process_group()
    return dist.get_rank() if dist else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of processes of this launch."""
    dist = process_group()
    return dist.get_world_size() if dist else int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """Rank within this node, used as GPU index."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    """True on rank 0, the one process that prints and writes shared files."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks; a no-op without a process group."""
    if dist := process_group():
        dist.barrier()


def sum_over_ranks(value: "Tensor") -> "Tensor":
    """All-reduce (sum) of `value`; out of place, not differentiable."""
    dist = process_group()
    # all-reduce is a no-op on one rank
    if dist is None or dist.get_world_size() == 1:
        return value
    value = value.clone()  # all_reduce works in place
    dist.all_reduce(value)
    return value


def process_group() -> Any:
    """torch.distributed if a process group is initialised, else None."""
    # sys.modules instead of an import: rank() must not load torch
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None
