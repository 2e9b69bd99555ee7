"""How data sets lie on people's disks: each layout as a stream of items for `unitok data convert`.

An item's info is what `KEY.json` will say: {"captions": [str]} and perhaps "long_caption", "short_caption";
{"conversations": [[{"from": "human" | "gpt", "value"}]]}; or {"document": [str | int]}, whose numbers are
those of the pictures.
"""

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from open_unitok.errors import UserError
from open_unitok.files import existing

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FILE_KEYS = ("file_name", "file", "image", "image_path", "path", "filename")
CAPTION_KEYS = ("captions", "caption", "text", "prompt")
METADATA = ("metadata.jsonl", "metadata.csv")
LONGEST_KEY = 90  # a tar's header has 100 bytes for a name


class Source(NamedTuple):
    """Where a data set lies, and what the user said about it."""

    path: Path
    images: Path | None = None  # folder that picture names are relative to
    column: str | None = None  # name of the caption's key

    @property
    def folder(self) -> Path:
        """Where the pictures are."""
        return self.images or (self.path if self.path.is_dir() else self.path.parent)


class Item(NamedTuple):
    """One sample to be; `problem` says why it cannot be one."""

    key: str
    pictures: list[Path]
    info: dict[str, Any]
    problem: str = ""


class Layout(NamedTuple):
    """A stream of items, the same on every call; and what was looked for."""

    items: Callable[[Source], Iterator[Item]]
    wanted: str


def picture_key(name: str) -> str:
    """The key of a picture's sample: its name without extension; odd characters become "_"."""
    stem = str(Path(name).with_suffix("")) if Path(name).suffix else name
    key = re.sub(r"[^\w/-]", "_", stem.lstrip("./"), flags=re.ASCII)
    if len(key) <= LONGEST_KEY:
        return key
    return f"{key[: LONGEST_KEY - 9]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


# ---- pictures with captions: a folder with .txt files, or with metadata.jsonl or .csv ----------------------


def folder_items(source: Source) -> Iterator[Item]:
    """A folder with `x.jpg` and `x.txt` (a caption per line), or with metadata; or a metadata file itself."""
    seen: Counter[str] = Counter()
    for name, info, problem in _named_pictures(source):
        key = picture_key(name)
        seen[key] += 1
        if seen[key] > 1:  # a.b.jpg beside a_b.jpg
            key = f"{key}-{seen[key]}"
        yield Item(key, [source.folder / name], {**info, "file": name}, problem)


def _named_pictures(source: Source) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(name of the picture, what is said of it, problem)."""
    if source.path.is_dir():
        metadata = next((source.path / m for m in METADATA if (source.path / m).exists()), None)
        if metadata is None:
            yield from _pictures_with_texts(source.path)
            return
    else:
        metadata = source.path
    for number, row in enumerate(read_rows(metadata), 1):
        name = next((row[key] for key in FILE_KEYS if isinstance(row.get(key), str) and row[key]), None)
        if name is None:
            has = ", ".join(map(str, row)) or "nothing"
            yield f"{metadata.name}_{number}", {}, f"names no picture ({FILE_KEYS[0]}); it has {has}"
        else:
            yield name, _captions_of(row, source.column), ""


def _pictures_with_texts(folder: Path) -> Iterator[tuple[str, dict[str, Any], str]]:
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or path.suffix.lower() not in PICTURES or not path.is_file():
            continue
        captions, problem = [], ""
        text = next((t for e in (".txt", ".caption") if (t := path.with_suffix(e)).is_file()), None)
        if text is not None:
            try:
                lines = text.read_text(encoding="utf-8-sig").splitlines()
                captions = [line.strip() for line in lines if line.strip()]
            except UnicodeDecodeError as error:
                problem = f"{text} is not UTF-8: {error}"
        yield relative.as_posix(), {"captions": captions}, problem


def _captions_of(row: dict[str, Any], column: str | None) -> dict[str, Any]:
    """The captions that a row of metadata gives."""
    if column is not None and column not in row:
        raise UserError(f"--column is {column}, but there are only: {', '.join(map(str, row))}.")
    value = next((row[key] for key in ((column,) if column else CAPTION_KEYS) if row.get(key)), [])
    texts = value if isinstance(value, list) else [value]
    extra = {key: str(row[key]) for key in ("long_caption", "short_caption") if row.get(key)}
    return {"captions": [str(text).strip() for text in texts if str(text).strip()], **extra}


# ---- files of rows -----------------------------------------------------------------------------------------


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl, .json (a list) or .csv file, one after the other.

    Raises:
        UserError: another ending, or a line that is none; the message names file and line.
    """
    if path.suffix == ".csv":
        with open(existing(path), encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file)
        return
    if path.suffix == ".json":
        try:
            rows = json.loads(path.read_bytes())
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(rows, list):
            raise UserError(f"{path} holds no list of samples, but {type(rows).__name__}.")
        numbered = enumerate(rows, 1)
    elif path.suffix == ".jsonl":
        numbered = _lines(path)
    else:
        raise UserError(f"{path}: .jsonl, .json or .csv is wanted.")
    for number, row in numbered:
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number}, is {type(row).__name__}: a mapping is wanted.")
        yield row


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    with open(existing(path), "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except ValueError as error:
                    raise UserError(f"{path}, line {number}, is not valid JSON: {error}") from error


LAYOUTS: dict[str, Layout] = {
    "folder": Layout(
        folder_items,
        "a folder with pictures beside .txt files, or with metadata.jsonl or metadata.csv (file_name, text).",
    ),
}
