"""What a data set holds, what of it is broken, and whether its codes fit a tokenizer.

Reads a code folder, tars of images (a folder or a glob), conversations in LLaVA's .json or .jsonl, and
plain text; each sample is looked at as training would read it. Exit code 2 where anything is broken.
"""

import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing, sha256, tokenizer_path

from .code_shards import MANIFEST, CodeFolder
from .extract import image_members
from .formats import read_rows, turns_of
from .tar_index import BadSample, Record, index, tars_of
from .text import TEXT_KEYS, Conversations, TextLines

SHOWN = 10  # broken samples that are named one by one


class Checked(NamedTuple):
    """One sample as it was found: its images (codes where they are codes), and what is said of them."""

    pictures: list[Any]
    info: dict[str, Any]


class Reading(NamedTuple):
    """How the samples of a data set are had: (name, reader) pairs, readers raise BadSample."""

    what: str
    total: int
    samples: Iterator[tuple[str, Callable[[], Checked]]]
    codes: CodeFolder | None = None
    problems: tuple[str, ...] = ()  # of whole files


class Report(NamedTuple):
    """What was found; `lines` are for people."""

    samples: int
    broken: list[str]
    lines: list[str]


def check(
    path: str,
    *,
    codes: str | None = None,
    samples: int = 0,
    fingerprint: str | None = None,
    quiet: bool = False,
) -> Report:
    """Look at a data set of any kind.

    Args:
        codes: code folder for conversations whose images are looked up by name.
        samples: how many to look at, evenly spread; 0 = all.
        fingerprint: of the visual tokenizer that codes must belong to.

    Raises:
        UserError: nothing that could be a data set.
    """
    if samples < 0:
        raise UserError("--samples is 0 (all) or more.")
    reading = _open(path, codes)
    found = _Tally(reading.codes.manifest["codebook_size"] if reading.codes else 0)
    broken = list(reading.problems)
    step = max(1, reading.total // samples) if samples else 1
    looked_at = 0
    for number, (name, read) in enumerate(
        tqdm(reading.samples, total=reading.total, unit=" samples", disable=quiet, file=sys.stderr)
    ):
        if number % step:
            continue
        looked_at += 1
        try:
            found.add(read())
        except BadSample as error:
            broken.append(f"{name} {error}")
    lines = [f"{path}: {reading.what}, {reading.total:,} samples, {looked_at:,} looked at", *found.lines()]
    if reading.codes is not None:
        line, fits = _tokenizer_line(reading.codes, fingerprint)
        lines.append(line)
        broken += [] if fits else [line.strip()]
        kinds = {"conversations": "conversation", "captions": "text_to_image"}
        kind = next((kinds[role] for role in kinds if role in found.roles), None)
        unsuited = reading.codes.unsuited(kind) if kind else None
        lines += [f"  note: {unsuited}"] if unsuited else []
    lines += [f"  broken: {text}" for text in broken[:SHOWN]]
    lines += [f"  broken: {len(broken) - SHOWN:,} more"] if len(broken) > SHOWN else []
    return Report(looked_at, broken, [*lines, f"  {len(broken):,} broken"])


class _Tally:
    """Counts over samples."""

    def __init__(self, codebook_size: int):
        self.pictures = 0
        self.roles: Counter[str] = Counter()
        self.words: dict[str, list[int]] = {}
        self.codebook_size = codebook_size
        self.used: np.ndarray | None = None  # (K, V) bool

    def add(self, sample: Checked) -> None:
        """Count one sample; raises BadSample if what is said of its images cannot be used."""
        info, pictures = sample.info, len(sample.pictures)
        texts = _texts(info, pictures)
        self.pictures += pictures
        for name, found in texts:
            self.roles[name] += 1
            self.words.setdefault(name, []).extend(len(text.split()) for text in found)
        if not texts and pictures:
            self.roles["nothing said"] += 1
        for codes in sample.pictures if self.codebook_size else ():
            if self.used is None:
                self.used = np.zeros((codes.shape[1], self.codebook_size), dtype=bool)
            self.used[np.arange(codes.shape[1]), codes] = True

    def lines(self) -> list[str]:
        """The counts, for people."""
        lines = [f"  {self.pictures:,} images"] if self.pictures else []
        for name, count in self.roles.items():
            words = self.words.get(name, [])
            lines.append(f"  {count:,} samples with {name}{_lengths(words) if words else ''}")
        if self.used is not None:
            shares = self.used.mean(axis=1)
            lines.append(f"  codes use {shares.min():.1%} to {shares.max():.1%} of a sub-codebook's entries")
        return lines


def _lengths(words: list[int]) -> str:
    ordered = sorted(words)
    high = ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))]
    return (
        f": {len(words):,} texts of {ordered[0]} to {ordered[-1]} words, median "
        f"{statistics.median_low(ordered)}, 95 % up to {high}"
    )


def _texts(info: dict[str, Any], pictures: int) -> list[tuple[str, list[str]]]:
    """[(what a sample can serve as, its texts)]; raises BadSample."""
    found: list[tuple[str, list[str]]] = []
    captions = info.get("captions") or []
    if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
        raise BadSample(f"has captions {str(captions)[:60]}: a list of texts is wanted")
    captions = [*captions, *(info[n] for n in ("long_caption", "short_caption") if info.get(n))]
    if captions:
        found.append(("captions", captions))
    talks = info.get("conversations") or []
    if not isinstance(talks, list):
        raise BadSample("has conversations that are no list")
    turns = [turn for talk in talks for turn in turns_of({"conversations": talk}, pictures)]
    if turns:
        found.append(("conversations", [t["value"] for t in turns if t["from"] == "gpt"]))
    document = info.get("document")
    if document is not None:
        if not isinstance(document, list):
            raise BadSample("has a document that is no list")
        places = [piece for piece in document if not isinstance(piece, str)]
        if not all(isinstance(place, int) and 0 <= place < pictures for place in places):
            raise BadSample(f"names images {places} in its document, but has {pictures}")
        found.append(("a document", [" ".join(piece for piece in document if isinstance(piece, str))]))
    if isinstance(info.get("text"), str):
        found.append(("text", [info["text"]]))
    return found


# ---- the kinds of data sets --------------------------------------------------------------------------------


def _open(path: str, codes: str | None) -> Reading:
    folder = Path(path)
    if codes and not path.endswith((".json", ".jsonl")):
        raise UserError("--codes belongs to conversations in a .json or .jsonl file.")
    if (folder / MANIFEST).exists():
        return _code_folder(folder)
    if folder.is_dir():
        if not any(folder.glob("*.tar")):
            raise UserError(
                f"{path} holds neither {MANIFEST} nor tars: `unitok data convert folder` makes tars of "
                "images."
            )
        return _tars(tars_of(f"{path}/*.tar", "PATH"))
    if path.endswith(".tar"):
        return _tars(tars_of(path, "PATH"))
    if path.endswith((".json", ".jsonl")) and not any(c in path for c in "*?[{"):
        first = next(read_rows(existing(path)), {})
        if {"conversations", "messages"} & first.keys():
            talks = Conversations(path, CodeFolder(codes) if codes else None)
            return Reading("conversations", len(talks), _talks(talks), talks.codes)
        for name, keys in (("obelics", {"texts", "images"}), ("mmc4", {"text_list", "image_info"})):
            if keys <= first.keys():
                raise UserError(f"{path} is to be converted first: unitok data convert {name} {path} DST.")
        if path.endswith(".json") or not set(TEXT_KEYS) & first.keys():
            raise UserError(
                f"{path} has neither conversations nor {' or '.join(TEXT_KEYS)}, but {list(first)}."
            )
    texts = TextLines(path)
    return Reading("plain text", len(texts), _lines(texts))


def _code_folder(folder: Path) -> Reading:
    codes = CodeFolder(folder)
    problems, good = [], []
    for number, shard in enumerate(codes.manifest["shards"]):
        path = folder / shard["file"]
        try:
            if sha256(existing(path)) != shard["sha256"]:
                problems.append(f"{path} is not as it was written (sha256)")
            codes.check_shard(number)
            good.append(number)
        except UserError as error:
            problems.append(str(error))

    def samples() -> Iterator[tuple[str, Callable[[], Checked]]]:
        for shard in good:
            for number in range(codes.sizes[shard]):

                def read(shard: int = shard, number: int = number) -> Checked:
                    sample = codes.read(shard, number)
                    return Checked(list(sample.images), sample.info)

                yield f"{codes.manifest['shards'][shard]['file']} sample {number}", read

    facts = codes.manifest
    what = f"codes in {len(codes.sizes)} tar(s), {facts['num_tokens']} x {facts['num_codebooks']} per image"
    return Reading(what, sum(codes.sizes[shard] for shard in good), samples(), codes, tuple(problems))


def _tars(tars: list[str]) -> Reading:
    found = [index(tar) for tar in tars]
    problems = tuple(f"{tar} is broken: {each.problem}" for tar, each in zip(tars, found) if each.problem)
    records = [record for each in found for record in each.records]

    def samples() -> Iterator[tuple[str, Callable[[], Checked]]]:
        for record in records:
            yield f"{record.tar} {record.key}", lambda record=record: _images(record)

    return Reading(f"images in {len(tars)} tar(s)", len(records), samples(), None, problems)


def _images(record: Record) -> Checked:
    from open_unitok.tokenizer.images import load_image

    members, info = image_members(record)
    try:
        return Checked([load_image(record.read(member)).size for member in members], info)
    except UserError as error:
        raise BadSample(f"has a broken image: {error}") from error


def _talks(talks: Conversations) -> Iterator[tuple[str, Callable[[], Checked]]]:
    for number in range(len(talks)):

        def read(number: int = number) -> Checked:
            sample = talks.read(0, number)
            return Checked(list(sample.images), sample.info)

        yield f"conversation {number}", read


def _lines(texts: TextLines) -> Iterator[tuple[str, Callable[[], Checked]]]:
    for shard, size in enumerate(texts.sizes):
        for number in range(size):

            def read(shard: int = shard, number: int = number) -> Checked:
                return Checked([], {"text": texts.read(shard, number)})

            yield str(texts.files[shard].path), read


# ---- the tokenizer -----------------------------------------------------------------------------------------


def _tokenizer_line(codes: CodeFolder, wanted: str | None) -> tuple[str, bool]:
    own = codes.manifest["tokenizer"]
    if wanted is None:
        return f"  codes of tokenizer {own[:12]} (not compared: give --tokenizer)", True
    if own == wanted:
        return f"  codes of the tokenizer given ({own[:12]})", True
    return f"  codes of another tokenizer ({own[:12]}) than the one given ({wanted[:12]})", False


def _fingerprint(folder: str) -> str:
    """Of a visual tokenizer's folder (or hub id), or of the one within an MLLM folder."""
    from open_unitok.tokenizer import UniTok

    return UniTok.from_pretrained(tokenizer_path(folder)).fingerprint()
