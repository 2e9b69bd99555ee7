"""The order in which samples are read: by index, or from tars through a shuffle buffer."""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from open_unitok.core.errors import UserError

from ..core.options import DataSource
from . import seeding
from .code_shards import SHUFFLED_TARS
from .tar_files import STDIN, StreamedTar, is_stream, matching_shards, shown
from .tar_index import LOGGED_BAD_SAMPLES, Notes, TarSample, describe_notes, scan_tar


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


@dataclasses.dataclass
class _Left:
    """What earlier readers left of an epoch: all but whole tars and first records, and what they buffered."""

    read: set[int] = dataclasses.field(default_factory=set)  # tars without any left
    records: dict[int, int] = dataclasses.field(default_factory=dict)  # tar -> first record that is left
    buffer: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # (tar, number in it)


class TarSource:
    """The order of one source's samples: position in the epoch, and the shuffle buffer."""

    def __init__(self, number: int, options: DataSource, seed: int, shuffle: int):
        self.name = options.name or f"source{number}"
        self.tars = matching_shards(options.path)
        if any(tar in STDIN for tar in self.tars):
            raise UserError("data.sources: stdin can be read only once; use a file or pipe:COMMAND.")
        self.streamed = [is_stream(tar) for tar in self.tars]
        self.reading: tuple[int, StreamedTar, Iterator[TarSample]] | None = None  # number and stream of a tar
        self.weight = options.weight
        self.seed = seed
        self.shuffle = shuffle
        self.number = number
        # position: `cursor` in this epoch's tars, `record` in that tar; `popped` samples left the buffer
        self.epoch = self.cursor = self.record = self.popped = 0
        self.broken: set[int] = set()
        self.noted: set[int] = set()  # tars whose notes were logged
        self.order: list[int] | None = None  # the tars of this epoch
        # what earlier readers left of an epoch, see ShardStream.continue_after
        self.left: dict[int, _Left] = {}
        self.buffer: list[tuple[int, int, TarSample]] = []

    def next(self, part: int, parts: int, report: Callable[[str], None]) -> tuple[int, int, TarSample]:
        """The next (tar, number in it, sample) among the tars of `part` (of `parts`)."""
        # an epoch without any sample means that there is none at all, unless earlier readers took them
        for _ in range(2 + len(self.left)):
            self._fill(part, parts, report)
            if self.buffer:
                # keyed by the number of pops: no generator state has to be stored
                keyed = seeding.derive_seed(self.seed, "pop", self.number, part, self.epoch, self.popped)
                at = keyed % len(self.buffer)
                self.popped += 1
                # swap with the last entry: removing it costs O(1)
                self.buffer[at], self.buffer[-1] = self.buffer[-1], self.buffer[at]
                return self.buffer.pop()
            self.epoch, self.cursor, self.record, self.popped = self.epoch + 1, 0, 0, 0
            self.order = None
        raise UserError(f"Source {self.name} has no readable sample ({self.tars[0]}, ...).")

    def _fill(self, part: int, parts: int, report: Callable[[str], None]) -> None:
        if len(self.buffer) >= self.shuffle:
            return
        if self.order is None:
            self.order = self.order_of(self.epoch, part, parts)
            left = self.left.get(self.epoch)
            if left is not None and left.buffer:
                self.buffer += self._read_again(left.buffer[part::parts])
                left.buffer = []
            self.left = {epoch: left for epoch, left in self.left.items() if epoch >= self.epoch}
            if self.cursor < len(self.order):
                self.record = max(self.record, self._first_record(self.order[self.cursor]))
        order = self.order
        while len(self.buffer) < self.shuffle and self.cursor < len(order):
            tar = order[self.cursor]
            wanted = self.shuffle - len(self.buffer)
            read = self._read_stream if self.streamed[tar] else self._read_file
            samples, ended = read(tar, wanted, report)
            self.buffer += [(tar, n, sample) for n, sample in enumerate(samples, self.record)]
            self.record += len(samples)
            if ended:
                self.cursor += 1
                self.record = self._first_record(order[self.cursor]) if self.cursor < len(order) else 0

    def _first_record(self, tar: int) -> int:
        left = self.left.get(self.epoch)
        return 0 if left is None else left.records.get(tar, 0)

    def _read_file(
        self, tar: int, wanted: int, report: Callable[[str], None]
    ) -> tuple[list[TarSample], bool]:
        """The next samples of a tar, and whether they are its last."""
        samples, problem, notes = scan_tar(self.tars[tar], self.name)
        if self.record == 0:
            self._report_tar(tar, problem, notes, report)
        return samples[self.record : self.record + wanted], self.record + wanted >= len(samples)

    def _read_stream(
        self, tar: int, wanted: int, report: Callable[[str], None]
    ) -> tuple[list[TarSample], bool]:
        if self.reading is None or self.reading[0] != tar:
            stream = StreamedTar(self.tars[tar], self.name)
            # after a resume: what was read before
            self.reading = tar, stream, itertools.islice(stream, self.record, None)
        _, stream, samples = self.reading
        found = list(itertools.islice(samples, wanted))
        if len(found) < wanted:
            self.reading = None
            self._report_tar(tar, stream.problem, stream.notes, report)
        return found, len(found) < wanted

    def _report_tar(self, tar: int, problem: str | None, notes: Notes, report: Callable[[str], None]) -> None:
        """Log what is wrong with a tar, once."""
        if notes and tar not in self.noted and len(self.noted) < LOGGED_BAD_SAMPLES:
            self.noted.add(tar)
            tqdm.write(f"data: {shown(self.tars[tar])}: {describe_notes(notes)}", file=sys.stderr)
        if problem and tar not in self.broken:
            self.broken.add(tar)
            report(f"{shown(self.tars[tar])} is broken: {problem}; the rest of it is skipped")

    def order_of(self, epoch: int, part: int, parts: int) -> list[int]:
        """The tars that a part reads in an epoch, in order."""
        order = list(range(len(self.tars)))
        seeding.python_random(self.seed, "tars", self.number, epoch).shuffle(order)
        if epoch in self.left:
            order = [tar for tar in order if tar not in self.left[epoch].read]
        return order[part::parts]

    def continue_after(self, states: Sequence[tuple[dict[str, Any], int, int]]) -> None:
        """Start with what the readers of `states` (state, part, parts) left of their epochs."""
        # as of the readers' start: all have the same, but for the buffers that they have emptied themselves
        earlier = TarSource._left_of(states[0][0])
        left: dict[int, _Left] = {}
        for epoch in range(min(s["epoch"] for s, _, _ in states), max(s["epoch"] for s, _, _ in states) + 1):
            known = earlier.get(epoch, _Left())
            left[epoch] = found = _Left(set(known.read), dict(known.records), [])
            for state, part, parts in states:
                self.left = earlier
                own = self.order_of(epoch, part, parts)
                if state["epoch"] > epoch:
                    found.read |= set(own)
                elif state["epoch"] < epoch or not (state["cursor"] or state["record"] or state["buffer"]):
                    # not begun: its share of the earlier readers' buffer is still there
                    found.buffer += TarSource._left_of(state).get(epoch, _Left()).buffer[part::parts]
                else:
                    found.read |= set(own[: state["cursor"]])
                    if state["cursor"] < len(own):
                        found.records[own[state["cursor"]]] = state["record"]
                    found.buffer += _pairs(state["buffer"])
        for state, _, _ in states:
            self.broken |= set(state["broken"])
        self.left = {**{epoch: part for epoch, part in earlier.items() if epoch > max(left)}, **left}
        self.epoch, self.popped = min(left), max(state["popped"] for state, _, _ in states)
        self.cursor = self.record = 0
        self.order = None

    @staticmethod
    def _left_of(state: Mapping[str, Any]) -> "dict[int, _Left]":
        return {
            epoch: _Left(set(read), dict(_pairs(records)), _pairs(buffer))
            for epoch, read, records, buffer in state.get("left", ())
        }

    def state_dict(self) -> dict[str, Any]:
        positions = _flat((tar, record) for tar, record, _ in self.buffer)
        numbers = {name: getattr(self, name) for name in ("epoch", "cursor", "record", "popped")}
        left = [
            (epoch, sorted(part.read), _flat(part.records.items()), _flat(part.buffer))
            for epoch, part in self.left.items()
        ]
        return {**numbers, "broken": sorted(self.broken), "left": left, "buffer": positions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("epoch", "cursor", "record", "popped"):
            setattr(self, name, state[name])
        self.broken, self.order = set(state["broken"]), None
        self.left = TarSource._left_of(state)
        if "skipped_tars" in state:  # written by an earlier version
            self.left = {state["skipped_epoch"]: _Left(set(state["skipped_tars"]))}
        self.reading = None
        self.buffer = self._read_again(_pairs(state["buffer"]))

    def _read_again(self, pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int, TarSample]]:
        """The samples at (tar, number in it)."""
        found = []
        # tars in order, as each is indexed once while it is cached
        samples = {
            tar: self._samples_at(tar, {n for t, n in pairs if t == tar}) for tar in sorted(dict(pairs))
        }
        for tar, number in pairs:
            if number in samples[tar]:
                found.append((tar, number, samples[tar][number]))
            else:
                text = f"{shown(self.tars[tar])}: sample {number} of the buffer cannot be read again"
                tqdm.write(f"data: {text}", file=sys.stderr)
        return found

    def _samples_at(self, tar: int, numbers: set[int]) -> dict[int, TarSample]:
        """number -> sample of a tar."""
        samples: Any = scan_tar(self.tars[tar], self.name).samples if not self.streamed[tar] else None
        if samples is None:
            samples = itertools.islice(StreamedTar(self.tars[tar], self.name), max(numbers) + 1)
        return {number: sample for number, sample in enumerate(samples) if number in numbers}


def _flat(pairs: Iterable[tuple[int, int]]) -> list[int]:
    return [number for pair in pairs for number in pair]


def _pairs(flat: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(flat[::2], flat[1::2]))
