"""Prefetch the steps of a mixture in worker processes; the batches and their order stay the same.

Of W workers, worker w builds steps w, w + W, ... counted from the mixture's current step, and skips the
others without building them. The state of a run is therefore the mixture's own and does not depend on W.
"""

import itertools
import pickle
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from open_unitok.core.processes import die_with_parent

from .shards import read_batches


class Steps(Protocol):
    """Builds the steps of a run in order; `seen` and `bad` count samples, `counts` those of each data set."""

    seen: int
    bad: int
    counts: np.ndarray

    def build(self) -> list[Any]:
        """This rank's micro-batches of the next step."""
        ...

    def skip(self) -> None:
        """Advance by one step without building it."""
        ...


class Prefetched(NamedTuple):
    """One step of this rank, with its numbers of seen and bad samples."""

    batches: bytes  # a pickled list[Batch]: faster than torch's shared-memory file per tensor
    seen: int
    bad: int
    counts: np.ndarray  # `Steps.counts` after this step


class _WorkerSteps(IterableDataset):
    def __init__(self, steps: Steps):
        self.steps = steps

    def __iter__(self) -> Iterator[Prefetched]:
        worker = get_worker_info()
        assert worker is not None
        steps = self.steps  # fork gave this process its own copy
        for number in itertools.count():
            if number % worker.num_workers == worker.id:
                seen, bad = steps.seen, steps.bad
                batches = steps.build()
                new = steps.seen - seen, steps.bad - bad
                yield Prefetched(pickle.dumps(batches), *new, steps.counts.copy())
            else:
                steps.skip()


def _identity(item: Any) -> Any:
    return item


def prefetch(steps: Steps, workers: int) -> Iterator[Prefetched]:
    """An endless iterator over the next steps, built by `workers` processes."""
    loader = DataLoader(
        _WorkerSteps(steps),
        batch_size=None,
        num_workers=workers,
        collate_fn=_identity,
        worker_init_fn=die_with_parent,
        multiprocessing_context="fork",  # open and memory-mapped files are shared instead of copied
    )
    return read_batches(loader)  # pyright: ignore
