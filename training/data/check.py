"""Check a data set: its contents, broken samples, and whether its codes belong to a tokenizer.

Reads a code folder, tars of images (a folder or a glob), conversations in LLaVA's .json or .jsonl, and plain
text. Every sample is read as training reads it.
"""

import itertools
import random
import statistics
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing, sha256
from open_unitok.tokenizer.image_modes import WAS_TRANSPARENT
from open_unitok.tokenizer.images import load_image

from .captions import with_captions
from .code_shards import CODES_MANIFEST, CodeFolder
from .records import TEXT_KEYS, read_records
from .sample_kinds import SAMPLE_KINDS, crop_mismatch
from .tar_files import STDIN, StreamedTar, is_stream, is_url, matching_shards, shown
from .tar_index import (
    BadSample,
    Notes,
    TarSample,
    add_note,
    describe_notes,
    image_members,
    matching_files,
    scan_tar,
)
from .text import Conversations, TextLines

_LISTED = 10  # broken samples that the report names one by one
_SHOWN_CAPTIONS = 5
_MANY = 5000  # larger data sets are sampled, if the user does not say how many samples to check
_AHEAD = 256  # samples that are read at a time


class DatasetReport(NamedTuple):
    """The result of a check; `lines` are the printed report."""

    samples: int
    broken: list[str]
    lines: list[str]


class CheckedSample(NamedTuple):
    """The images of one sample (codes where the data set holds codes) and its info."""

    images: list[Any]
    info: dict[str, Any]
    transparent: int = 0  # images that are composited on a background


SampleReader = Callable[[], CheckedSample]  # raises BadSample


class _OpenDataset(NamedTuple):
    """A data set of any type as (name, reader) pairs."""

    description: str
    total: int
    samples: Iterator[tuple[str, SampleReader]]
    codes: CodeFolder | None = None
    problems: tuple[str, ...] = ()  # of whole files
    notes: tuple[Notes, ...] = ()  # on members of tars
    streams: tuple[StreamedTar, ...] = ()  # their problems and notes are known once they are read


def check_dataset(
    path: str,
    *,
    codes: str | None = None,
    samples: int | None = None,
    workers: int = 0,
    fingerprint: str | None = None,
    quiet: bool = False,
) -> DatasetReport:
    """Check a data set of any type.

    Args:
        codes: code folder for conversations whose images are looked up by name.
        samples: how many to check, evenly spread; 0 = all, None = all if they are not very many.
        workers: threads that read and decode samples; 0 = the main thread.
        fingerprint: of the visual tokenizer that the codes must belong to.

    Raises:
        UserError: `path` is not a data set.
    """
    if workers < 0 or (samples is not None and samples < 0):
        raise UserError("--samples and --workers must be 0 or more.")
    dataset = _open(path, codes)
    counts = _Counts(dataset.codes)
    broken = list(dataset.problems)
    # evenly spread: every step-th sample
    most = samples if samples is not None else _MANY
    step = max(1, dataset.total // most) if most else 1
    checked = total = 0
    bar = tqdm(dataset.samples, total=dataset.total or None, unit=" samples", disable=quiet, file=sys.stderr)
    chosen = (sample for number, sample in enumerate(bar) if number % step == 0)
    for name, found in _read_all(chosen, workers):
        checked += 1
        try:
            if isinstance(found, BadSample):
                raise found
            counts.add(found)
        except BadSample as error:
            broken.append(f"{name} {error}")
    total = dataset.total or checked
    broken += [f"{shown(s.source)} is broken: {s.problem}" for s in dataset.streams if s.problem]
    every = f" (every {step}th; --samples 0 checks all)" if step > 1 else ""
    lines = [
        f"{path}: {dataset.description}, {total:,} samples, {checked:,} checked{every}",
        *counts.lines(),
        *_note_lines([*dataset.notes, *(stream.notes for stream in dataset.streams)]),
    ]
    if dataset.codes is not None:
        line, fits = _tokenizer_line(dataset.codes, fingerprint)
        lines.append(line)
        broken += [] if fits else [line.strip()]
        warning = _crop_warning(dataset.codes, set(counts.fields))
        lines += [f"  note: {warning}"] if warning else []
    lines += [f"  broken: {text}" for text in broken[:_LISTED]]
    lines += [f"  broken: {len(broken) - _LISTED:,} more"] if len(broken) > _LISTED else []
    return DatasetReport(checked, broken, [*lines, f"  {len(broken):,} broken"])


def _read_all(
    samples: Iterator[tuple[str, SampleReader]], workers: int
) -> Iterator[tuple[str, CheckedSample | BadSample]]:
    """The samples in order, or why they cannot be read."""

    def attempt(sample: tuple[str, SampleReader]) -> tuple[str, CheckedSample | BadSample]:
        name, read = sample
        try:
            return name, read()
        except BadSample as error:
            return name, error

    if not workers:
        yield from map(attempt, samples)
        return
    # threads suffice: Pillow releases the GIL while it decodes
    with ThreadPoolExecutor(workers) as pool:
        while group := list(itertools.islice(samples, _AHEAD)):
            yield from pool.map(attempt, group)


def _note_lines(notes: list[Notes]) -> list[str]:
    total: Notes = {}
    for reason, (count, name) in (item for note in notes for item in note.items()):
        add_note(total, reason, name, count)
    return [f"  note: {describe_notes({reason: found})}" for reason, found in total.items()]


class _Counts:
    """Counts over samples."""

    def __init__(self, codes: CodeFolder | None):
        self.images = self.transparent = 0
        self.fields: Counter[str] = Counter()  # field of KEY.json -> samples that have it
        self.words: dict[str, list[int]] = {}  # field -> words of each text
        self.code_sizes = codes.code_sizes if codes else []  # of the K codes
        self.crops = codes.crops if codes else 1  # of each image
        self.used: np.ndarray | None = None  # (K, V) bool
        self.shown: list[str] = []  # a random sample of captions
        self._random = random.Random(0)

    def add(self, sample: CheckedSample) -> None:
        """Count one sample; raises BadSample if a field of its info is malformed."""
        num_images = len(sample.images)
        by_field: dict[str, list[str]] = {}
        for kind in SAMPLE_KINDS.values():
            if kind.field not in by_field:  # several kinds read the same field
                by_field[kind.field] = kind.texts(sample.info, num_images // self.crops)
        by_field = {field: texts for field, texts in by_field.items() if texts}
        self.images += num_images
        self.transparent += sample.transparent
        if captions := by_field.get("captions"):
            # every sample with captions has the same chance to be shown (reservoir sampling)
            count = self.fields["captions"]
            place = count if count < _SHOWN_CAPTIONS else self._random.randrange(count + 1)
            if place < _SHOWN_CAPTIONS:
                self.shown[place : place + 1] = [self._random.choice(captions)]
        for field, texts in by_field.items():
            self.fields[field] += 1
            self.words.setdefault(field, []).extend(len(text.split()) for text in texts)
        if not by_field and num_images:
            self.fields["images only"] += 1
        for codes in sample.images if self.code_sizes else ():
            if self.used is None:
                self.used = np.zeros((codes.shape[1], max(self.code_sizes)), dtype=bool)
            self.used[np.arange(codes.shape[1]), codes] = True

    def lines(self) -> list[str]:
        """The counts as lines of the report."""
        lines = [f"  {self.images:,} images"] if self.images else []
        if self.transparent:
            lines.append(f"  {self.transparent:,} images with transparent parts, which are put on white")
        for field, count in self.fields.items():
            words = self.words.get(field, [])
            lines.append(f"  {count:,} samples with {field}{_text_lengths(words) if words else ''}")
            if field == "captions":
                lines += [f"    {textwrap.shorten(caption, 90)}" for caption in self.shown]
        if self.used is not None:
            shares = self.used.sum(axis=1) / np.array(self.code_sizes)
            lines.append(f"  codes use {shares.min():.1%} to {shares.max():.1%} of a sub-codebook's entries")
        return lines


def _text_lengths(words: list[int]) -> str:
    ordered = sorted(words)
    high = ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))]
    return (
        f": {len(words):,} texts of {ordered[0]} to {ordered[-1]} words, median "
        f"{statistics.median_low(ordered)}, 95 % up to {high}"
    )


def _crop_warning(codes: CodeFolder, fields: set[str]) -> str | None:
    """A warning if the images were cropped or padded in another way than the samples' kind expects."""
    # field -> its first kind; later fields first: samples with captions and conversations are used as
    # conversations
    kinds = {
        kind.field: name
        for name, kind in reversed(SAMPLE_KINDS.items())
        if kind.crop and kind.field in fields
    }
    return crop_mismatch(codes, next(iter(kinds.values()))) if kinds else None


# ---- one function per type of data set ---------------------------------------------------------------------


def _open(path: str, codes: str | None) -> _OpenDataset:
    folder = Path(path)
    if codes and not path.endswith((".json", ".jsonl")):
        raise UserError("--codes is allowed only with conversations in a .json or .jsonl file.")
    if (folder / CODES_MANIFEST).exists():
        return _open_code_folder(folder)
    if folder.is_dir():
        if not any(folder.glob("*.tar")):
            raise UserError(
                f"{path} holds neither {CODES_MANIFEST} nor tars: make tars of images with `unitok data "
                "convert folder`."
            )
        return _open_tars(matching_files(f"{path}/*.tar", "PATH"))
    if path.endswith(".tar") or is_url(path) or path in STDIN:
        return _open_tars(matching_shards(path, "PATH"))
    if path.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")):
        return _open_tars(matching_files(path, "PATH"))
    if path.endswith((".json", ".jsonl")) and not any(c in path for c in "*?[{"):
        # the first record tells texts, conversations and unconverted documents apart
        first = next(read_records(existing(path)), {})
        if {"conversations", "messages"} & first.keys():
            conversations = Conversations(path, CodeFolder(codes) if codes else None)
            samples = _conversation_samples(conversations)
            return _OpenDataset("conversations", len(conversations), samples, conversations.codes)
        for name, keys in (("obelics", {"texts", "images"}), ("mmc4", {"text_list", "image_info"})):
            if keys <= first.keys():
                raise UserError(f"{path} must be converted first: unitok data convert {name} {path} DST.")
        if path.endswith(".json") or not set(TEXT_KEYS) & first.keys():
            raise UserError(
                f"{path} has the keys {list(first)}, expected conversations or {' or '.join(TEXT_KEYS)}."
            )
    texts = TextLines(path)
    return _OpenDataset("plain text", len(texts), _text_samples(texts))


def _open_code_folder(folder: Path) -> _OpenDataset:
    codes = CodeFolder(folder)
    problems, good = [], []
    for number, shard in enumerate(codes.manifest["shards"]):
        path = folder / shard["file"]
        try:
            # a shard that changed may still be readable: report it and check its samples
            if sha256(existing(path)) != shard["sha256"]:
                problems.append(f"{path} has changed since it was written (sha256)")
            codes.check_shard(number)
            good.append(number)
        except UserError as error:
            problems.append(str(error))

    def samples() -> Iterator[tuple[str, SampleReader]]:
        for shard in good:
            for number in range(codes.sizes[shard]):
                # the defaults bind the loop variables now: readers are called later
                def read(shard: int = shard, number: int = number) -> CheckedSample:
                    sample = codes.read(shard, number)
                    if codes.features is not None:
                        _ = sample.features  # read as training does
                    return CheckedSample(list(sample.images), sample.info)

                yield f"{codes.manifest['shards'][shard]['file']} sample {number}", read

    facts = codes.manifest
    description = (
        f"codes in {len(codes.sizes)} tar(s), {facts['num_tokens']} x {facts['num_codebooks']} per image"
    )
    if codes.features is not None:
        stored = codes.features
        description += f", features of {stored.source}, {stored.tokens} x {stored.width}"
    total = sum(codes.sizes[shard] for shard in good)
    return _OpenDataset(description, total, samples(), codes, tuple(problems))


def _open_tars(tars: list[str]) -> _OpenDataset:
    streams = tuple(StreamedTar(tar) for tar in tars if is_stream(tar))
    files = [tar for tar in tars if not is_stream(tar)]
    total, problems, notes = 0, [], []
    for tar in files:
        index = scan_tar(tar)
        total += len(index.samples)
        problems += [f"{tar} is broken: {index.problem}"] if index.problem else []
        notes.append(index.notes)
    total = 0 if streams else total  # the samples of a stream are not known before it is read

    def samples() -> Iterator[tuple[str, SampleReader]]:
        # scanned again, as the samples of all tars may not fit into memory
        for found in itertools.chain((scan_tar(tar).samples for tar in files), streams):
            for record in found:
                yield f"{shown(record.tar)} {record.key}", lambda record=record: _load_images(record)

    return _OpenDataset(
        f"images in {len(tars)} tar(s)", total, samples(), None, tuple(problems), tuple(notes), streams
    )


def _load_images(record: TarSample) -> CheckedSample:
    members, info = image_members(record)
    info = with_captions(record, info)
    try:
        # (1, 1): of a JPEG all is read, but little is decoded
        images = [load_image(record.read(member), needed=(1, 1)) for member in members]
        transparent = sum(WAS_TRANSPARENT in image.info for image in images)
        return CheckedSample([image.size for image in images], info, transparent)
    except UserError as error:
        raise BadSample(f"has a broken image: {error}") from error


def _conversation_samples(conversations: Conversations) -> Iterator[tuple[str, SampleReader]]:
    for number in range(len(conversations)):

        def read(number: int = number) -> CheckedSample:
            sample = conversations.read(0, number)
            return CheckedSample(list(sample.images), sample.info)

        yield f"conversation {number}", read


def _text_samples(texts: TextLines) -> Iterator[tuple[str, SampleReader]]:
    for shard, size in enumerate(texts.sizes):
        for number in range(size):

            def read(shard: int = shard, number: int = number) -> CheckedSample:
                return CheckedSample([], texts.read(shard, number).info)

            yield str(texts.files[shard].path), read


# ---- the tokenizer -----------------------------------------------------------------------------------------


def _tokenizer_line(codes: CodeFolder, expected: str | None) -> tuple[str, bool]:
    own = codes.manifest["tokenizer"]
    if expected is None:
        return f"  codes of tokenizer {own[:12]} (not compared: give --tokenizer)", True
    if own == expected:
        return f"  codes of the tokenizer given ({own[:12]})", True
    return f"  codes of another tokenizer ({own[:12]}) than the one given ({expected[:12]})", False
