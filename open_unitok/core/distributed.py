"""Rank and world size, with or without torch.distributed; a single process is rank 0 of 1."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .errors import UserError

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
    """Wait for all ranks; a no-op without a process group. Inside a `RankGuard`, its barrier."""
    if RankGuard.current is not None:
        RankGuard.current.wait()
    elif dist := process_group():
        dist.barrier()


class RankGuard:
    """Barriers and sections that fail on all ranks if one rank fails.

    torch's own barrier waits for a rank that has raised an exception until its timeout.

    Args:
        store: a torch.distributed store that all ranks share.
        poll_seconds: how often the others are asked for.
    """

    current: "RankGuard | None" = None  # the guard that `barrier` uses

    def __init__(self, store: Any, rank: int, world_size: int, poll_seconds: float = 0.05):
        self.store, self.rank, self.world_size, self.poll_seconds = store, rank, world_size, poll_seconds
        self.number = self.barriers = 0  # of the section, and of barriers in it: the same on all ranks

    def wait(self) -> None:
        """A barrier.

        Raises:
            UserError: another rank failed in this section.
        """
        self.barriers += 1
        self._arrive(f"{self.number}/barrier {self.barriers}", f"{self.number}/error")

    @contextlib.contextmanager
    def section(self) -> Iterator[None]:
        """Work that all ranks do together; if it fails on one, it fails on all, and all go on after it."""
        ended = False
        try:
            yield
            # the others may fail after this rank's last barrier
            self._arrive(f"{self.number}/end", f"{self.number}/error")
        except UserError as error:
            self._report(f"{self.number}/error", error)
            raise
        except Exception as error:  # a bug: this rank ends with its traceback
            ended = True
            self._report("fatal", error)
            raise
        finally:
            if not ended:
                self._arrive(f"{self.number}/left")
                self.number, self.barriers = self.number + 1, 0

    def close(self) -> None:
        """Leave together: the main rank, which may hold the store, leaves last."""
        with contextlib.suppress(UserError):
            self.wait()
        self.store.add("closed", 1)
        end = time.monotonic() + 10
        while self.rank == 0 and self.store.add("closed", 0) < self.world_size and time.monotonic() < end:
            time.sleep(self.poll_seconds)

    def _report(self, key: str, error: Exception) -> None:
        """Tell the other ranks; the first error counts."""
        if not self.store.check([key]):
            self.store.set(key, f"rank {self.rank}: {error or type(error).__name__}")

    def _arrive(self, key: str, error_key: str = "fatal") -> None:
        """Wait until all ranks have arrived at `key`, or one has failed."""
        self.store.add(key, 1)
        while self.store.add(key, 0) < self.world_size:
            for error in (error_key, "fatal"):
                if self.store.check([error]):
                    raise UserError(self.store.get(error).decode())
            time.sleep(self.poll_seconds)


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
