"""Webdataset tars as an endless stream of samples that resumes exactly in the middle of an epoch.

The order of samples is a function of (seed, epoch): tars are shuffled, their samples pass through a shuffle
buffer, and sources are mixed by weight. The buffer holds positions in tars, not bytes, so the state is small.
Streams (URLs, `pipe:` commands, compressed tars) cannot seek: their samples lie in the buffer, and a resumed
run reads the tars again of which it held samples.
"""

import dataclasses
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

from ..core.options import ShardOptions
from . import seeding
from .sample_order import TarSource
from .tar_files import shown, source_name
from .tar_index import LOGGED_BAD_SAMPLES, MIN_SEEN_FOR_BAD_SHARE, BadSample, TarSample


@dataclasses.dataclass
class _Readers:
    """Readers of the same order of samples on another number of ranks, who were not all equally far.

    Attributes:
        index: of the next sample among those that were theirs.
        positions: of each, in the order of ranks and of workers in a rank.
    """

    index: int
    micro_batch: int
    ranks: int
    positions: list[int]

    def took(self, position: int) -> bool:
        """Whether one of them took the sample at `position`; call it once for each, in order."""
        micro = self.index // self.micro_batch
        self.index += 1
        workers = len(self.positions) // self.ranks
        return self.positions[micro % self.ranks * workers + micro // self.ranks % workers] > position


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
        # position in the order of samples; `index` counts those that earlier readers have not taken
        self.position = self.index = self.seen = self.bad = 0
        self.earlier: list[_Readers] = []
        self.logged: set[str] = set()
        self.part, self.parts = 0, 1
        self.sources = [TarSource(n, s, seed, options.shuffle) for n, s in enumerate(options.sources)]
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
            taken = shared and any(readers.took(self.position) for readers in self.earlier)
            self.position += 1
            if taken:
                continue
            micro = self.index // self.micro_batch
            self.index += 1
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

    def _sample_source(self, part: int) -> TarSource:
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
        names = ("position", "index", "seen", "bad", "part", "parts", "micro_batch")
        worker = get_worker_info()
        return {
            **{name: getattr(self, name) for name in names},
            "split": self.options.split,
            "reader": (self.rank, worker.id if worker else 0),
            "earlier": [dataclasses.asdict(readers) for readers in self.earlier],
            "sources": [source.state_dict() for source in self.sources],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        for name in ("position", "seen", "bad"):
            setattr(self, name, state[name])
        # an earlier version could not continue after other readers
        self.index = state.get("index", self.position)
        self.earlier = [_Readers(**readers) for readers in state.get("earlier", ())]
        for source, saved in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(saved)

    def continue_after(self, states: Any) -> None:
        """Continue after readers of another number of ranks or workers: every sample of their epoch is read
        once, and with split "samples" in their order. Call it before the first batch.

        Args:
            states: the states of all their loaders, in any nesting.

        Raises:
            UserError: they had other sources or another split, or their states are of an earlier version.
        """
        found = {tuple(state["reader"]): state for state in _stream_states(states) if "reader" in state}
        readers = [found[key] for key in sorted(found)]
        if not readers:
            raise UserError(
                "resume_from: the checkpoint does not record the position in the data; use init_from."
            )
        if any(len(state["sources"]) != len(self.sources) for state in readers):
            raise UserError("resume_from: that run had another number of data.sources; use init_from.")
        split = readers[0]["split"]
        if len(readers) > 1 and split != self.options.split:
            raise UserError(f"resume_from: that run had data.split={split}: set it, or use init_from.")
        # one reader of all tars is of either split
        shared = self.options.split == "samples"
        first = min(readers, key=lambda state: state["position"]) if shared else readers[0]
        for number, source in enumerate(self.sources):
            if shared:
                source.load_state_dict(first["sources"][number])
            else:
                source.continue_after(
                    [(state["sources"][number], state["part"], state["parts"]) for state in readers]
                )
        self.position = first["position"]
        self.index = 0
        self.seen, self.bad = (sum(state[name] for state in readers) for name in ("seen", "bad"))
        if shared:
            own = _Readers(
                index=first["index"],
                micro_batch=first["micro_batch"],
                ranks=1 + max(rank for rank, _ in found),
                positions=[state["position"] for state in readers],
            )
            self.earlier = [*(_Readers(**earlier) for earlier in first["earlier"]), own]


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
