"""The mixture of tasks the MLLM learns from: weighted, seeded, and resumed exactly from a handful of numbers.

Which data set a sample comes from follows the weights as closely as whole samples can; which of its samples,
from a shuffle per epoch; which caption, whether unconditional, from numbers keyed by (seed, step). None of
this depends on the number of ranks or on accumulation: they only cut the same global batch to micro-batches.
"""

import hashlib
import json
import pickle
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
from tqdm import tqdm

from open_unitok.core import distributed
from open_unitok.core.errors import UserError

from ..mllm.config import MixtureEntry, MixtureOptions
from . import seeding
from .code_shards import CodeFolder, CodeSample, Order
from .collate import Batch, Rows, Sample, collate
from .formats import turns_of
from .mixture_workers import Made, steps_ahead
from .tar_index import BadSample
from .text import Conversations, TextLines

Dataset = CodeFolder | Conversations | TextLines
JUDGED_FROM = 200  # samples seen before the share of bad ones is judged
ATTEMPTS = 20  # other samples tried in place of a bad one
SHUFFLE_NAMES = {"text_to_image": "drawing"}  # names that seed the shuffle are older than the kinds' names


class Mixture:
    """Endless global batches, cut into this rank's micro-batches.

    Args:
        fingerprint: of the visual tokenizer; code folders of another one are refused.
    """

    def __init__(
        self,
        options: MixtureOptions,
        rows: Rows,
        *,
        seed: int,
        batch_size: int,
        accumulation: int = 1,
        fingerprint: str | None = None,
    ):
        self.options, self.rows, self.seed = options, rows, seed
        self.batch_size, self.accumulation = batch_size, accumulation
        self.entries = options.mixture
        self.sets = open_sets(options.mixture, fingerprint)  # one per entry
        total = sum(entry.weight for entry in self.entries)
        self.shares = np.array([entry.weight / total for entry in self.entries])
        self.orders = [
            Order(data.sizes, seed, f"{n} {SHUFFLE_NAMES.get(e.kind, e.kind)}")
            for n, (e, data) in enumerate(zip(self.entries, self.sets))
        ]
        self.step = self.seen = self.bad = 0
        self.counts = np.zeros(len(self.entries), dtype=np.int64)
        self._ahead: Iterator[Made] | None = None

    @property
    def fingerprint(self) -> str:
        """Hex digest of all data sets: other data, or data in another order, gives another one."""
        facts = [[e.kind, e.weight, data.fingerprint] for e, data in zip(self.entries, self.sets)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def next(self) -> list[Batch]:
        """This rank's micro-batches of the next step, one per accumulation step.

        Raises:
            UserError: too many samples are bad.
        """
        if not self.options.workers:
            return self.make()
        if self._ahead is None:
            self._ahead = steps_ahead(self, self.options.workers)
        made = next(self._ahead)
        self.skip()
        self.seen, self.bad = self.seen + made.seen, self.bad + made.bad
        return pickle.loads(made.batches)

    def skip(self) -> None:
        """Go on to the step after the next one."""
        for _ in range(self.batch_size):
            self._pick()
        self.step += 1

    def make(self) -> list[Batch]:
        """`next` in this process."""
        plan = [self._pick() for _ in range(self.batch_size)]
        numbers = np.random.default_rng(seeding.derive_seed(self.seed, "choices", self.step)).random(
            (self.batch_size, 3)
        )
        micro = self.batch_size // (distributed.world_size() * self.accumulation)
        world, rank = distributed.world_size(), distributed.rank()

        def make(slot: int) -> Sample:
            return self._sample(*plan[slot], numbers[slot].tolist(), slot)

        if self.options.group_by_length:
            ordered = sorted(map(make, range(self.batch_size)), key=lambda sample: len(sample.row.ids))
            steps = [ordered[a * micro * world : (a + 1) * micro * world] for a in range(self.accumulation)]
            mine = [samples[rank::world] for samples in steps]
        else:
            starts = [(a * world + rank) * micro for a in range(self.accumulation)]
            mine = [[make(slot) for slot in range(start, start + micro)] for start in starts]
        self.step += 1
        pad = self.rows.processor.pad_token_id
        return [collate(samples, self.rows.image_token_id, pad, self.options.pack_to) for samples in mine]

    def _pick(self) -> tuple[int, int]:
        """The entry that lags most behind its share, and the place in its order."""
        behind = self.shares * (self.counts.sum() + 1) - self.counts
        entry = int(behind.argmax())
        self.counts[entry] += 1
        return entry, int(self.counts[entry]) - 1

    def _sample(self, number: int, place: int, choices: list[float], slot: int) -> Sample:
        """The sample at `place` of an entry; if it is bad, another one that the seed picks."""
        entry, order, data = self.entries[number], self.orders[number], self.sets[number]
        self.seen += 1
        for attempt in range(ATTEMPTS):
            shard, item = order[place]
            try:
                return _KINDS[entry.kind](self, entry, data.read(shard, item), choices)
            except BadSample as error:
                self._report(f"{entry.path}: {entry.kind} {shard}/{item} {error}")
                place = seeding.derive_seed(self.seed, "instead", self.step, slot, attempt) % order.total
        raise UserError(
            f"data.mixture: {ATTEMPTS} samples of {entry.path} in a row cannot be used as {entry.kind}."
        )

    def _report(self, text: str) -> None:
        self.bad += 1
        if self.bad <= 10:
            tqdm.write(f"data: skipped {text}", file=sys.stderr)
        if self.seen >= JUDGED_FROM and self.bad > self.options.max_bad_share * self.seen:
            raise UserError(
                f"{self.bad} of {self.seen} samples cannot be used, more than data.max_bad_share = "
                f"{self.options.max_bad_share:g}; the last: {text}. Mend the data or raise it."
            )

    def state_dict(self) -> dict[str, Any]:
        """Where the mixture stands: the same on any number of ranks, but for the counts of bad samples."""
        return {"step": self.step, "seen": self.seen, "bad": self.bad, "counts": self.counts.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._ahead = None
        self.step, self.seen, self.bad = state["step"], state["seen"], state["bad"]
        self.counts = np.array(state["counts"], dtype=np.int64)


# ---- what a sample becomes in each role; `choices` are three numbers in [0, 1) -----------------------------


def _pair(mixture: Mixture, entry: MixtureEntry, sample: CodeSample, choices: list[float]) -> Sample:
    """An image and one of its captions, to be drawn (or, by its share, captioned)."""
    options = mixture.options
    if len(sample.images) != 1:
        raise BadSample(f"has {len(sample.images)} images: one is wanted")
    drawing = entry.kind == "text_to_image" and choices[2] < options.text_to_image_share
    long, short, captions = (sample.info.get(n) for n in ("long_caption", "short_caption", "captions"))
    caption = (short or long) if choices[0] >= 1 - options.short_captions or not long else long
    if caption is None and captions:
        if not isinstance(captions, list):
            raise BadSample(f"has captions {str(captions)[:40]!r}: a list of texts is wanted")
        caption = captions[int(choices[0] * len(captions))]
    if caption is not None and not isinstance(caption, str):
        raise BadSample(f"has the caption {caption!r}: a text is wanted")
    if not drawing:
        if not caption:
            raise BadSample("has no caption")
        return _with_images(mixture, "captioning", caption, sample.images)
    if choices[1] >= 1 - options.unconditional:
        caption = None
    return _with_images(mixture, "text_to_image", caption, sample.images)


def _talk(mixture: Mixture, entry: MixtureEntry, sample: CodeSample, choices: list[float]) -> Sample:
    """One of the conversations about the sample's images."""
    talks = sample.info.get("conversations")
    if not isinstance(talks, list) or not talks:
        raise BadSample("has no conversation")
    turns = json.dumps(turns_of({"conversations": talks[int(choices[0] * len(talks))]}, len(sample.images)))
    return _with_images(mixture, entry.kind, turns, sample.images)


def _document(mixture: Mixture, entry: MixtureEntry, sample: CodeSample, _choices: list[float]) -> Sample:
    """Texts and images in turns, as many as fit into max_length."""
    document, images = sample.info.get("document"), sample.images
    if not isinstance(document, list) or not document:
        raise BadSample("has no document")
    order = [piece for piece in document if not isinstance(piece, str)]
    if not all(isinstance(piece, int) and 0 <= piece < len(images) for piece in order):
        raise BadSample(f"names images {order} in its document, but has {len(images)}")
    made = _with_images(mixture, entry.kind, json.dumps(document), tuple(images[i] for i in order))
    left = int((made.row.ids == mixture.rows.image_token_id).sum())
    return made._replace(images=made.images[: left // len(images[0]) if order else 0])


def _with_images(mixture: Mixture, kind: str, text: str | None, images: tuple[np.ndarray, ...]) -> Sample:
    return Sample(kind, mixture.rows.make(kind, text, tuple(map(len, images))), images)


def _plain(mixture: Mixture, entry: MixtureEntry, line: str, _choices: list[float]) -> Sample:
    return Sample(entry.kind, mixture.rows.make("text", line, ()), ())


_KINDS: dict[str, Callable[..., Sample]] = {
    "text_to_image": _pair,
    "captioning": _pair,
    "conversation": _talk,
    "alignment": _talk,
    "text": _plain,
    "document": _document,
    "reading": _document,
}


def open_sets(entries: list[MixtureEntry], fingerprint: str | None) -> list[Dataset]:
    """The data set of each entry; one that several entries name is opened once.

    Raises:
        UserError: it is not there, or it is of another kind or of another visual tokenizer.
    """
    texts = cache(TextLines)
    folders = cache(lambda path: CodeFolder(path, fingerprint))
    talks = cache(lambda path, codes: Conversations(path, folders(codes) if codes else None))
    found: list[Dataset] = []
    for entry in entries:
        if entry.kind == "text":
            found.append(texts(entry.path))
        elif entry.path.endswith((".json", ".jsonl")):
            found.append(talks(entry.path, entry.codes))
        else:
            found.append(folders(entry.path))
    return found
