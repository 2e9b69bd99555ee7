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


_LAUNCH = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what every launcher sets


def rank() -> int:
    """Global rank of this process.

    Raises:
        UserError: as `world_size`.
    """
    # RANK: torchrun sets it before the process group is initialised
    dist = process_group()
    if dist:
        return dist.get_rank()
    return _number("RANK", 0, world_size()) if world_size() > 1 else 0


def world_size() -> int:
    """Number of processes of this launch.

    Raises:
        UserError: WORLD_SIZE is set outside a launch, as schedulers do: this process would silently do one
            rank's share of the work.
    """
    dist = process_group()
    if dist:
        return dist.get_world_size()
    count = _number("WORLD_SIZE", 1)
    missing = [name for name in _LAUNCH if name not in os.environ]
    if count > 1 and missing:
        raise UserError(
            f"WORLD_SIZE = {count}, but {' and '.join(missing)} not set: this is not a launch of torchrun. "
            "Unset RANK and WORLD_SIZE to run one process, or launch with torchrun."
        )
    return max(count, 1)


def local_rank() -> int:
    """Rank within this node, used as GPU index.

    Raises:
        UserError: LOCAL_RANK is not a whole number.
    """
    return _number("LOCAL_RANK", 0)


def under_launcher() -> bool:
    """Whether torchrun or deepspeed started this process.

    Raises:
        UserError: as `world_size`.
    """
    return world_size() >= 1 and all(name in os.environ for name in _LAUNCH)


def share_of(count: int, what: str) -> str:
    """ " (rank 1 of 8 has 3 of 20 images)" in a launch of several ranks, else ""."""
    if world_size() == 1:
        return ""
    mine = len(range(rank(), count, world_size()))
    return f" (rank {rank()} of {world_size()} has {mine} of {count} {what})"


def _number(name: str, default: int, limit: int | None = None) -> int:
    """An environment variable as a whole number from 0 to `limit` - 1."""
    text = os.environ.get(name, str(default))
    if not text.strip().isdecimal() or (limit is not None and int(text) >= limit):
        allowed = "a whole number" if limit is None else f"a whole number from 0 to {limit - 1}"
        raise UserError(f"The environment variable {name} is {text!r}; it must be {allowed}: unset it.")
    return int(text)


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
