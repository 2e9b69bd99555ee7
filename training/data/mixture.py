"""The weighted and seeded mixture of data sets that an MLLM is trained on; its state is a few numbers.

The data set of each sample follows the weights as closely as whole samples allow; the sample comes from one
shuffle per epoch; its caption, and whether it is unconditional, from random numbers keyed by (seed, step).
None of this depends on the number of ranks or on accumulation: they only split the same global batch.
"""

import hashlib
import itertools
import json
import pickle
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from tqdm import tqdm

from open_unitok.core import distributed
from open_unitok.core.errors import UserError
from open_unitok.tokenizer.token_layout import TokenLayout

from . import seeding
from .code_shards import CodeFolder, FeatureFacts
from .collate import Batch, TrainingSample, collate
from .mixture_options import MixtureEntry, MixtureOptions
from .prefetch import Prefetched, prefetch
from .sample_kinds import CONVERSATION_FILE, SAMPLE_KINDS, TEXT_FILE
from .sample_order import ShuffledOrder
from .sequences import SequenceBuilder
from .tar_index import LOGGED_BAD_SAMPLES, MIN_SEEN_FOR_BAD_SHARE, BadSample
from .text import Conversations, TextLines

Dataset = CodeFolder | Conversations | TextLines
MAX_REPLACEMENTS = 20  # other samples tried in place of a bad one


class Mixture:
    """Endless global batches, split into this rank's micro-batches.

    Args:
        fingerprint: of the visual tokenizer; code folders of another one are rejected.
        features: those that images which are read have beside their codes; None = none, or they follow from
            the codes.
    """

    def __init__(
        self,
        options: MixtureOptions,
        sequences: SequenceBuilder,
        *,
        seed: int,
        batch_size: int,
        accumulation: int = 1,
        fingerprint: str | None = None,
        features: FeatureFacts | None = None,
    ):
        self.options, self.sequences, self.seed = options, sequences, seed
        self.batch_size, self.accumulation = batch_size, accumulation
        self.entries = options.mixture
        self.stored_features = features is not None
        self.datasets = open_datasets(options, fingerprint, features)  # one per entry
        total = sum(entry.weight for entry in self.entries)
        self.shares = np.array([entry.weight / total for entry in self.entries])
        self.orders = [
            ShuffledOrder(data.sizes, seed, f"{n} {SAMPLE_KINDS[e.kind].shuffle_name or e.kind}")
            for n, (e, data) in enumerate(zip(self.entries, self.datasets))
        ]
        self.step = self.seen = self.bad = 0
        self.counts = np.zeros(len(self.entries), dtype=np.int64)  # samples taken from each entry
        self._prefetched: Iterator[Prefetched] | None = None

    @property
    def fingerprint(self) -> str:
        """Hex digest of all data sets: other data, or data in another order, gives another one."""
        facts = [[e.kind, e.weight, data.fingerprint] for e, data in zip(self.entries, self.datasets)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def next(self) -> list[Batch]:
        """This rank's micro-batches of the next step, one per accumulation step.

        Raises:
            UserError: too many samples are bad.
        """
        if not self.options.workers:
            return self.build()
        if self._prefetched is None:
            self._prefetched = prefetch(self, self.options.workers)
        step = next(self._prefetched)
        # the worker advanced its own copy of this object: bring this one to the same state
        self.step, self.counts = self.step + 1, step.counts
        self.seen, self.bad = self.seen + step.seen, self.bad + step.bad
        return pickle.loads(step.batches)

    def skip(self) -> None:
        """Advance by one step without building its batches."""
        if self.options.batch_by == "rows":
            self._fill_rows()  # the number of samples follows from their lengths
        else:
            for _ in range(self.batch_size):
                self._next_position()
        self.step += 1

    def build(self) -> list[Batch]:
        """Like `next`, but always in this process."""
        micro = self.batch_size // (distributed.world_size() * self.accumulation)
        world, rank = distributed.world_size(), distributed.rank()
        # the global batch is split by accumulation step first, then by rank
        starts = [(a * world + rank) * micro for a in range(self.accumulation)]
        rows = self._fill_rows() if self.options.batch_by == "rows" else None
        if rows is not None:
            batches = [self._collate(rows[start : start + micro]) for start in starts]
        else:
            batches = [self._collate(samples) for samples in self._split_samples(starts, micro)]
        self.step += 1
        return batches

    def _split_samples(self, starts: list[int], micro: int) -> list[list[TrainingSample]]:
        """The next `batch_size` samples: this rank's, `micro` from each of `starts`."""
        positions = [self._next_position() for _ in range(self.batch_size)]
        # sampled for the whole batch, so that a sample's numbers do not depend on which rank builds it
        random = self._random().random((self.batch_size, 3))
        world, rank = distributed.world_size(), distributed.rank()

        def build(index: int) -> TrainingSample:
            return self._sample(*positions[index], random[index].tolist(), index)

        if self.options.group_by_length:
            # neighbours in length share a micro-batch over all ranks, which saves padding
            ordered = sorted(map(build, range(self.batch_size)), key=lambda sample: len(sample.sequence.ids))
            steps = [ordered[a * micro * world : (a + 1) * micro * world] for a in range(self.accumulation)]
            return [samples[rank::world] for samples in steps]
        return [[build(index) for index in range(start, start + micro)] for start in starts]

    def _fill_rows(self) -> list[list[TrainingSample]]:
        """The samples of the next step in `batch_size` rows, each in the fullest row that still holds it; the
        first that fits in no row begins the next step."""
        random = self._random()
        rows: list[list[TrainingSample]] = [[] for _ in range(self.batch_size)]
        free = np.full(self.batch_size, self.options.pack_to)
        for index in itertools.count():
            before = self.counts.copy(), self.seen, self.bad
            sample = self._sample(*self._next_position(), random.random(3).tolist(), index)
            length = len(sample.sequence.ids)
            fitting = np.flatnonzero(free >= length)
            if not len(fitting):
                self.counts, self.seen, self.bad = before
                return rows
            row = int(fitting[free[fitting].argmin()])
            rows[row].append(sample)
            free[row] -= length
        raise AssertionError

    def _random(self) -> np.random.Generator:
        return np.random.default_rng(seeding.derive_seed(self.seed, "choices", self.step))

    def _collate(self, samples: list[TrainingSample] | list[list[TrainingSample]]) -> Batch:
        processor = self.sequences.processor
        return collate(
            samples,
            processor.image_token_id,
            processor.pad_token_id,
            self.options.pack_to,
            processor.feature_token_id,
            processor.sep_token_id,
        )

    def _next_position(self) -> tuple[int, int]:
        """(entry that is furthest behind its share, position in its order)."""
        # largest remainder: after n samples no entry is more than one away from its share of n
        behind = self.shares * (self.counts.sum() + 1) - self.counts
        entry = int(behind.argmax())
        self.counts[entry] += 1
        return entry, int(self.counts[entry]) - 1

    def _sample(self, number: int, position: int, random: list[float], index: int) -> TrainingSample:
        """The sample at `position` of an entry; a bad one is replaced by another that the seed determines."""
        entry, order, data = self.entries[number], self.orders[number], self.datasets[number]
        self.seen += 1
        for attempt in range(MAX_REPLACEMENTS):
            shard, item = order[position]
            try:
                return self._build_sample(entry, data, shard, item, random)
            except BadSample as error:
                self._report(f"{entry.path}: {entry.kind} {shard}/{item} {error}")
                position = seeding.derive_seed(self.seed, "instead", self.step, index, attempt) % order.total
        raise UserError(
            f"data.mixture: {MAX_REPLACEMENTS} samples of {entry.path} in a row cannot be used as "
            f"{entry.kind}."
        )

    def _build_sample(
        self, entry: MixtureEntry, data: Dataset, shard: int, item: int, random: list[float]
    ) -> TrainingSample:
        name = SAMPLE_KINDS[entry.kind].alternative(self.options, random) or entry.kind
        kind = SAMPLE_KINDS[name]
        sample = data.read(shard, item)
        text, numbers = kind.select(sample, self.options, random)
        places = data.codes.image_places if data.codes is not None else 0
        sequence = self.sequences.build(name, text, (places,) * len(numbers))
        if kind.may_drop_images and numbers:
            # the sequence may end before the last images: drop these too
            numbers = numbers[: self.sequences.num_images(name, sequence, places)]
        codes = tuple(sample.images[number] for number in numbers)
        # the task switch: images that are generated have codes alone
        visual_input = "discrete" if kind.generates_images else self.sequences.processor.visual_input
        if visual_input == "discrete" or not numbers:
            return TrainingSample(name, sequence, codes)
        features = codes
        if self.stored_features:
            stored = sample.features
            features = tuple(stored[number] for number in numbers)
        return TrainingSample(name, sequence, () if visual_input == "continuous" else codes, features)

    def _report(self, text: str) -> None:
        self.bad += 1
        if self.bad <= LOGGED_BAD_SAMPLES:
            tqdm.write(f"data: skipped {text}", file=sys.stderr)
        if self.seen >= MIN_SEEN_FOR_BAD_SHARE and self.bad > self.options.max_bad_share * self.seen:
            raise UserError(
                f"{self.bad} of {self.seen} samples cannot be used, more than data.max_bad_share = "
                f"{self.options.max_bad_share:g}; the last: {text}. Fix the data or raise it."
            )

    def state_dict(self) -> dict[str, Any]:
        """Position in the data: the same on any number of ranks, except for the counts of bad samples."""
        return {"step": self.step, "seen": self.seen, "bad": self.bad, "counts": self.counts.tolist()}

    @staticmethod
    def merge_states(states: list[dict[str, Any]]) -> dict[str, Any]:
        """The state of every rank of a run that was saved by other ranks."""
        return {**states[0], **{name: sum(state[name] for state in states) for name in ("seen", "bad")}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self._prefetched = None  # workers that are running would continue from the old position
        self.step, self.seen, self.bad = state["step"], state["seen"], state["bad"]
        self.counts = np.array(state["counts"], dtype=np.int64)


def codes_layout(codes: CodeFolder) -> TokenLayout:
    """The layout of the visual tokens in a code folder."""
    manifest = codes.manifest
    layout, num_tokens = manifest.get("layout"), manifest["num_tokens"]
    if layout is None and "grid" in manifest:
        rows, columns = manifest["grid"]
        layout = TokenLayout(rows, columns, num_tokens - rows * columns)
    if manifest.get("scales"):  # more tokens than the grid
        return TokenLayout.from_config(layout, None)
    return TokenLayout.from_config(layout, num_tokens)


def open_datasets(
    options: MixtureOptions, fingerprint: str | None, features: FeatureFacts | None = None
) -> list[Dataset]:
    """The data set of each entry; one that several entries name is opened once.

    Raises:
        UserError: it is missing, empty, of another type, or made by another visual tokenizer; images of it
            are read, and it lacks their features.
    """
    entries = options.mixture
    # folders whose images are only generated need no features
    need = {
        entry.codes if entry.dataset == CONVERSATION_FILE else entry.path
        for entry in entries
        if SAMPLE_KINDS[entry.kind].generated_share(options) < 1
    }
    # an index of a large data set costs seconds and memory: share it between entries
    texts = cache(TextLines)
    folders = cache(lambda path: CodeFolder(path, fingerprint, features if path in need else None))
    conversations = cache(lambda path, codes: Conversations(path, folders(codes) if codes else None))
    found: list[Dataset] = []
    for entry in entries:
        dataset = entry.dataset
        if dataset == TEXT_FILE:
            found.append(texts(entry.path))
        elif dataset == CONVERSATION_FILE:
            found.append(conversations(entry.path, entry.codes))
        else:
            found.append(folders(entry.path))
    for entry, dataset in zip(entries, found):
        if not len(dataset):
            raise UserError(f"data.mixture: {entry.path} holds no sample.")
        codes = dataset.codes
        if codes is None or codes.crops == 1:
            continue
        if not SAMPLE_KINDS[entry.kind].samples_crops or entry.dataset == CONVERSATION_FILE:
            raise UserError(
                f"{codes.folder} holds {codes.crops} crops of each image (extract-codes --ten-crop), which "
                f"kind {entry.kind} would read as {codes.crops} images: extract codes without --ten-crop."
            )
    return found
