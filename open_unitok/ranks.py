"""Who am I among the processes of one launch (torchrun or deepspeed); one process alone is rank 0 of 1."""

import os

import torch
import torch.distributed as dist


def rank() -> int:
    """This process's number over all nodes."""
    return (
        dist.get_rank() if dist.is_available() and dist.is_initialized() else int(os.environ.get("RANK", 0))
    )


def world_size() -> int:
    """How many processes run together."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """This process's number on its own node: the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    """True on the one process that prints and writes shared files."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes; nothing to do when alone."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The sum of `value` over all processes, on each of them; not differentiable."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value
