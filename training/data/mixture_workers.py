"""Making the mixture's steps ahead of time in other processes; the batches and their order stay the same.

Of W processes, process w makes the steps w, w + W, ... counted from where the mixture stands; the others it
only counts through. The state of a run is therefore the mixture's own, whatever W is or becomes.
"""

import itertools
import pickle
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .shards import read

if TYPE_CHECKING:
    from .mixture import Mixture


class Made(NamedTuple):
    """One step of this rank, and how many samples were looked at and were bad in making it."""

    batches: bytes  # a pickled list[Batch]: quicker than a shared file per tensor
    seen: int
    bad: int


class _Steps(IterableDataset):
    def __init__(self, mixture: "Mixture"):
        self.mixture = mixture

    def __iter__(self) -> Iterator[Made]:
        worker = get_worker_info()
        assert worker is not None
        mixture = self.mixture  # this process has a copy of its own
        for number in itertools.count():
            if number % worker.num_workers == worker.id:
                seen, bad = mixture.seen, mixture.bad
                batches = mixture.make()
                yield Made(pickle.dumps(batches), mixture.seen - seen, mixture.bad - bad)
            else:
                mixture.skip()


def _as_it_is(item: Any) -> Any:
    return item


def steps_ahead(mixture: "Mixture", workers: int) -> Iterator[Made]:
    """The mixture's next steps without end, made by `workers` processes."""
    loader = DataLoader(
        _Steps(mixture),
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        multiprocessing_context="fork",  # files that are open and mapped are shared, nothing is copied
    )
    return read(loader)
