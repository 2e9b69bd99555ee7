"""Who am I among the processes of one launch (torchrun or deepspeed); one process alone is rank 0 of 1."""

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def group() -> Any:
    """torch.distributed where a process group is up, else None; torch is not loaded only to ask."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def rank() -> int:
    """This process's number over all nodes."""
    dist = group()
    return dist.get_rank() if dist else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes run together."""
    dist = group()
    return dist.get_world_size() if dist else int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """This process's number on its own node: the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    """True on the one process that prints and writes shared files."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes; nothing to do when alone."""
    if dist := group():
        dist.barrier()


def sum_over_ranks(value: "Tensor") -> "Tensor":
    """The sum of `value` over all processes, on each of them; not differentiable."""
    dist = group()
    if dist is None or dist.get_world_size() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value
