"""The order in which the samples of a data set are read."""

from functools import lru_cache

import numpy as np
import torch

from . import seeding
from .code_shards import SHUFFLED_TARS


class ShuffledOrder:
    """Position -> sample, without end: every epoch is a new shuffle, a function of the seed.

    The tars of an epoch are shuffled, then their samples within groups of `SHUFFLED_TARS` tars, so that a
    large data set is read tar by tar; a small one is one group, and so shuffled as a whole.
    """

    def __init__(self, sizes: list[int], seed: int, name: str):
        self.sizes, self.seed, self.name = sizes, seed, name
        self.total = sum(sizes)
        # two, as prefetching reads into the next epoch or group while this one is finished
        self._epoch = lru_cache(maxsize=2)(self._epoch_of)
        self._group = lru_cache(maxsize=2)(self._group_of)

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(shard, number in it) of the sample at `position`, counted from the first epoch on."""
        epoch, within = divmod(position, self.total)
        shards, ends = self._epoch(epoch)
        group = int(np.searchsorted(ends, within, side="right"))
        chosen = shards[group * SHUFFLED_TARS : (group + 1) * SHUFFLED_TARS]
        starts, shuffled = self._group(epoch, group, tuple(chosen))
        # a number within the group, then the tar that contains it
        number = int(shuffled[within - (int(ends[group - 1]) if group else 0)])
        at = int(np.searchsorted(starts, number, side="right")) - 1
        return chosen[at], number - int(starts[at])

    def _epoch_of(self, epoch: int) -> tuple[list[int], np.ndarray]:
        shards = [shard for shard, size in enumerate(self.sizes) if size]
        # keyed generators: any position can be computed without those before it, so resuming needs no state
        seeding.python_random(self.seed, "tars", self.name, epoch).shuffle(shards)
        groups = [shards[i : i + SHUFFLED_TARS] for i in range(0, len(shards), SHUFFLED_TARS)]
        return shards, np.cumsum([sum(self.sizes[s] for s in group) for group in groups])

    def _group_of(self, epoch: int, group: int, chosen: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        sizes = [self.sizes[shard] for shard in chosen]
        random = seeding.torch_generator(self.seed, "samples", self.name, epoch, group)
        return np.cumsum([0, *sizes[:-1]]), torch.randperm(sum(sizes), generator=random).numpy()
