"""Webdataset tars as an endless stream of samples that resumes exactly in the middle of an epoch.

The order of samples is a function of (seed, epoch): tars are shuffled, their samples pass through a shuffle
buffer, and sources are mixed by weight. The buffer holds positions in tars, not bytes, so the state is small.
Streams (URLs, `pipe:` commands, compressed tars) cannot seek: their samples lie in the buffer, and a resumed
run reads the tars again of which it held samples.
"""

import hashlib
import itertools
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info
from tqdm import tqdm

from open_unitok.core.errors import UserError
from open_unitok.core.processes import die_with_parent

from ..core.options import DataSource, ShardOptions
from . import seeding
from .tar_files import STDIN, StreamedTar, is_stream, matching_shards, shown, source_name
from .tar_index import (
    LOGGED_BAD_SAMPLES,
    MIN_SEEN_FOR_BAD_SHARE,
    BadSample,
    Notes,
    TarSample,
    describe_notes,
    scan_tar,
)


class _Source:
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
        # tars that are left out of one epoch, see ShardStream.skip_started_tars
        self.skipped_tars: set[int] = set()
        self.skipped_epoch = -1
        self.buffer: list[tuple[int, int, TarSample]] = []

    def next(self, part: int, parts: int, report: Callable[[str], None]) -> tuple[int, int, TarSample]:
        """The next (tar, number in it, sample) among the tars of `part` (of `parts`)."""
        for _ in range(2):  # an epoch without any sample means that there is none at all
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
        order = self.order
        while len(self.buffer) < self.shuffle and self.cursor < len(order):
            tar = order[self.cursor]
            wanted = self.shuffle - len(self.buffer)
            read = self._read_stream if self.streamed[tar] else self._read_file
            samples, ended = read(tar, wanted, report)
            self.buffer += [(tar, n, sample) for n, sample in enumerate(samples, self.record)]
            self.record += len(samples)
            if ended:
                self.cursor, self.record = self.cursor + 1, 0

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
        if epoch == self.skipped_epoch:
            order = [tar for tar in order if tar not in self.skipped_tars]
        return order[part::parts]

    def skip_started_tars(self, states: Sequence[tuple[dict[str, Any], int, int]]) -> None:
        """Start in the epoch of `states` (state, part, parts) without the tars that they had started."""
        epoch = min(state["epoch"] for state, _, _ in states)
        self.skipped_tars, self.skipped_epoch = (
            set(states[0][0]["skipped_tars"]),
            states[0][0]["skipped_epoch"],
        )
        started = set(self.skipped_tars) if self.skipped_epoch == epoch else set()
        for state, part, parts in states:
            # a reader that is already in a later epoch has started all its tars of this one
            own = self.order_of(epoch, part, parts)
            started |= set(own[: state["cursor"] + (state["record"] > 0)] if state["epoch"] == epoch else own)
            self.broken |= set(state["broken"])
        whole = len(started) == len(self.tars)
        self.epoch, self.skipped_tars = (epoch + 1, set()) if whole else (epoch, started)
        self.skipped_epoch, self.order = self.epoch, None

    def state_dict(self) -> dict[str, Any]:
        # a flat list of tar, number, tar, number, ...
        positions = [number for tar, record, _ in self.buffer for number in (tar, record)]
        numbers = {
            name: getattr(self, name) for name in ("epoch", "cursor", "record", "popped", "skipped_epoch")
        }
        tars = {"broken": sorted(self.broken), "skipped_tars": sorted(self.skipped_tars)}
        return {**numbers, **tars, "buffer": positions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("epoch", "cursor", "record", "popped"):
            setattr(self, name, state[name])
        self.broken, self.order = set(state["broken"]), None
        self.skipped_tars = set(state.get("skipped_tars", ()))
        self.skipped_epoch = state.get("skipped_epoch", -1)
        pairs = list(zip(state["buffer"][::2], state["buffer"][1::2]))
        self.reading = None
        self.buffer = []
        # tars in order, as each is indexed once while it is cached
        samples = {
            tar: self._samples_at(tar, {n for t, n in pairs if t == tar}) for tar in sorted(dict(pairs))
        }
        for tar, number in pairs:
            if number in samples[tar]:
                self.buffer.append((tar, number, samples[tar][number]))
            else:
                text = f"{shown(self.tars[tar])}: sample {number} of the buffer cannot be read again"
                tqdm.write(f"data: {text}", file=sys.stderr)

    def _samples_at(self, tar: int, numbers: set[int]) -> dict[int, TarSample]:
        """number -> sample of a tar."""
        samples: Any = scan_tar(self.tars[tar], self.name).samples if not self.streamed[tar] else None
        if samples is None:
            samples = itertools.islice(StreamedTar(self.tars[tar], self.name), max(numbers) + 1)
        return {number: sample for number, sample in enumerate(samples) if number in numbers}


class ShardStream(IterableDataset):
    """An endless stream of decoded samples for one rank.

    With split "samples" every rank and worker follows the same order and takes its own micro-batches, so that
    the global batches do not depend on their number; with "shards" each reads its own tars, which large data
    needs.

    Args:
        decode: (tar sample, random) -> sample; raises BadSample (or UserError) for a sample to be skipped.
            `random` is keyed by (seed, epoch, source, tar, number): augmentation does not depend on ranks.
    """

    def __init__(
        self,
        options: ShardOptions,
        decode: Callable[[TarSample, random.Random], Any],
        *,
        seed: int,
        micro_batch: int,
        rank: int = 0,
        ranks: int = 1,
    ):
        self.options = options
        self.decode = decode
        self.seed = seed
        self.micro_batch = micro_batch
        self.rank, self.ranks = rank, ranks
        self.position = self.seen = self.bad = 0
        self.logged: set[str] = set()
        self.part, self.parts = 0, 1
        self.sources = [_Source(n, s, seed, options.shuffle) for n, s in enumerate(options.sources)]
        parts = ranks * max(1, options.workers)
        for source in self.sources:
            if options.split == "shards" and len(source.tars) < parts:
                raise UserError(
                    f"Source {source.name} has {len(source.tars)} tar(s) for {ranks} rank(s) x "
                    f"{options.workers} worker(s): lower data.workers, or use data.split=samples."
                )
            if options.split == "samples" and parts > 1 and any(source.streamed) and rank == 0:
                text = (
                    f"each of {parts} readers streams all of {source.name}; data.split=shards reads it once"
                )
                tqdm.write(f"data: {text}", file=sys.stderr)

    def fingerprint(self) -> str:
        """Hex digest of names, sizes and first bytes of all tars: another data set gives another one."""
        digest = hashlib.sha256()
        for source in self.sources:
            for path, streamed in zip(source.tars, source.streamed):
                if streamed and not os.path.isfile(path):
                    digest.update(source_name(path).encode())
                    continue
                digest.update(f"{os.path.basename(path)} {os.path.getsize(path)} ".encode())
                # the first bytes: hashing whole data sets would take hours
                with open(path, "rb") as file:
                    digest.update(file.read(1 << 16))
        return digest.hexdigest()

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        """Yield (sample, bad samples skipped since the previous one)."""
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        # split "samples": every reader goes through all tars and drops the micro-batches of the others
        shared = self.options.split == "samples"
        part, parts = (0, 1) if shared else (self.rank * workers + number, self.ranks * workers)
        self.part, self.parts = part, parts
        skipped = 0
        while True:
            source = self._sample_source(part)
            tar, number_in_tar, tar_sample = source.next(part, parts, lambda text: self._report(text, part))
            epoch = source.epoch
            micro = self.position // self.micro_batch
            self.position += 1
            if shared and (micro % self.ranks != self.rank or micro // self.ranks % workers != number):
                continue
            self.seen += 1
            # keyed by the sample, not by a running generator: the same augmentation on any rank and worker
            try:
                keyed = seeding.python_random(self.seed, "sample", source.number, epoch, tar, number_in_tar)
                sample = self.decode(tar_sample, keyed)
            except (BadSample, UserError) as error:
                self.bad += 1
                skipped += 1
                self._report(f"{shown(tar_sample.tar)}: sample {tar_sample.key} is skipped: {error}", part)
                continue
            yield sample, skipped
            skipped = 0

    def _sample_source(self, part: int) -> _Source:
        if len(self.sources) == 1:
            return self.sources[0]
        uniform = seeding.derive_seed(self.seed, "source", part, self.position) / (1 << 63)  # 63-bit seeds
        at = uniform * sum(s.weight for s in self.sources)
        for source in self.sources:
            at -= source.weight
            if at < 0:
                return source
        return self.sources[-1]

    def _report(self, text: str, part: int) -> None:
        """Log a bad sample or a broken tar; raises UserError if there are too many."""
        # once, not in every epoch
        shown_enough = text in self.logged or min(self.bad, len(self.logged)) > LOGGED_BAD_SAMPLES
        if not shown_enough and (part or self.rank == 0):
            self.logged.add(text)
            tqdm.write(f"data: {text}", file=sys.stderr)
        limit = self.options.max_bad_share
        advice = (
            f"more than data.max_bad_share = {limit:.2%}: fix the data or raise it. The last one: {text}."
        )
        if self.seen >= MIN_SEEN_FOR_BAD_SHARE and self.bad > limit * self.seen:
            raise UserError(f"{self.bad} of {self.seen} samples cannot be used, {advice}")
        for source in self.sources:
            # a single one is allowed: one tar of a small data set may exceed the share
            if len(source.broken) > max(1, limit * len(source.tars)):
                raise UserError(f"{len(source.broken)} of {len(source.tars)} tars are broken, {advice}")

    def take(self) -> list[tuple[Any, int]]:
        """The first micro-batch, read in this process: (sample, skipped) pairs."""
        return list(itertools.islice(iter(self), self.micro_batch))

    def state_dict(self) -> dict[str, Any]:
        """The position of this worker."""
        counts = {name: getattr(self, name) for name in ("position", "seen", "bad", "part", "parts")}
        return {**counts, "sources": [source.state_dict() for source in self.sources]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        for name in ("position", "seen", "bad"):
            setattr(self, name, state[name])
        for source, saved in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(saved)

    def skip_started_tars(self, states: Any) -> None:
        """Continue after readers of another number of ranks or workers, at the granularity of tars.

        Their epoch continues without the tars that any of them had started; samples left in their shuffle
        buffers are not seen in that epoch. Call it before the first batch.

        Args:
            states: their loaders' states, in any nesting.

        Raises:
            UserError: they had other sources, or their states do not list the tars.
        """
        found = list(_stream_states(states))
        if not found or any("skipped_tars" not in source for state in found for source in state["sources"]):
            raise UserError(
                "resume_from: the checkpoint does not record which tars were started; use init_from."
            )
        if any(len(state["sources"]) != len(self.sources) for state in found):
            raise UserError("resume_from: that run had another number of data.sources; use init_from.")
        for number, source in enumerate(self.sources):
            source.skip_started_tars(
                [(state["sources"][number], state["part"], state["parts"]) for state in found]
            )


def _stream_states(value: Any) -> Iterator[dict[str, Any]]:
    """The states of streams anywhere in a loader's state."""
    if isinstance(value, dict) and "sources" in value and "position" in value:
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _stream_states(inner)


class _Collate:
    """Add the number of skipped samples to the batch; a class, so that a spawned worker can unpickle it."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]):
        self.collate = collate

    def __call__(self, items: Sequence[tuple[Any, int]]) -> dict[str, Any]:
        batch = self.collate([sample for sample, _ in items])
        batch["skipped"] = sum(skipped for _, skipped in items)
        return batch


def build_loader(stream: ShardStream, collate: Callable[[list[Any]], dict[str, Any]]) -> Any:
    """A StatefulDataLoader of micro-batches: the dict that `collate` returns, with "skipped" (a count).

    Its state_dict is this rank's exact position in the data; iterate it with `read_batches`.
    """
    from torchdata.stateful_dataloader import StatefulDataLoader

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls a deprecated function of torch
        return StatefulDataLoader(
            stream,
            batch_size=stream.micro_batch,
            num_workers=stream.options.workers,
            collate_fn=_Collate(collate),
            worker_init_fn=die_with_parent,
            pin_memory=torch.cuda.is_available(),
        )


def read_batches(batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The loader's batches; a UserError of a worker process is raised with its own one-line message."""
    # DataLoader re-raises a worker's error with the worker's traceback as its text
    try:
        yield from batches
    except UserError as error:
        text = str(error).strip()
        if "Original Traceback" not in text:
            raise
        raise UserError(text.splitlines()[-1].partition("UserError: ")[2]) from None
    except RuntimeError as error:
        # torch's watchdog: a worker was killed, usually for memory
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            "A data worker was killed (out of memory? use fewer data.workers): run the same command again to "
            "resume from the last checkpoint."
        ) from error
