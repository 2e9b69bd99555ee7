"""Read the records of data sets: files of records, captions, conversations (LLaVA's JSON), documents.

Conversion, `unitok data check` and training share these functions, so that all three accept the same input.
"""

import csv
import hashlib
import itertools
import json
import os
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing

from .tar_index import BadSample

TEXT_KEYS = ("text", "content")
_SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
_IMAGE_MARK = "<image>"
_MAX_KEY = 90  # a tar header has 100 bytes for a name, and an extension follows


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a .jsonl, .json (a list) or .csv file, one after the other.

    Raises:
        UserError: another extension, or a record that is malformed; the message names file and line.
    """
    if path.suffix == ".csv":
        # utf-8-sig: spreadsheets write a byte-order mark
        with open(existing(path), encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file)
        return
    if path.suffix == ".json":
        try:
            records = json.loads(path.read_bytes())
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(records, list):
            raise UserError(f"{path} holds {type(records).__name__}, expected a list of samples.")
        numbered = enumerate(records, 1)
    elif path.suffix == ".jsonl":
        numbered = _json_lines(path)
    else:
        raise UserError(f"{path}: expected a .jsonl, .json or .csv file.")
    for number, record in numbered:
        if not isinstance(record, dict):
            raise UserError(f"{path}, record {number}, is {type(record).__name__}, expected a mapping.")
        yield record


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with open(existing(path), "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except ValueError as error:
                    raise UserError(f"{path}, line {number}, is not valid JSON: {error}") from error


# ---- names of images ---------------------------------------------------------------------------------------


def image_name(name: str, roots: Iterable[str] = ()) -> str:
    """The name of an image relative to its folder: a.png, ./a.png, //a.png, x/../a.png and, below one of
    `roots`, ROOT/a.png are one image. Letters are in the composed form (NFC), which macOS decomposes.

    Raises:
        BadSample: the name leads out of the folder.
    """
    path = posixpath.normpath(name) if name else "."
    for root in roots:
        if path.startswith(f"{root}/"):
            path = path[len(root) + 1 :]
            break
    path = path.lstrip("/")
    if path in (".", "..") or path.startswith("../"):
        raise BadSample(f"names the image {name!r}, which is not a file below the folder of the images")
    return unicodedata.normalize("NFC", path)


def file_of_image(folder: Path, name: str) -> Path:
    """The file of an image in a folder, whether it exists or not.

    Raises:
        BadSample: the name leads out of the folder.
    """
    # a root is where the folder seems to lie, or, behind links, does
    relative = image_name(name, (os.path.abspath(folder), os.path.realpath(folder)))
    if name.startswith("/") and not os.path.lexists(folder / relative):
        raise BadSample(f"names the image {name}, which is not below {folder} (--images)")
    forms = [folder / unicodedata.normalize(form, relative) for form in ("NFC", "NFD")]
    exact = folder / posixpath.normpath(name.lstrip("/"))
    return next((path for path in (exact, *forms) if os.path.lexists(path)), forms[0])


def image_key(name: str) -> str:
    """The key of an image's sample: its name without extension; other than letters, digits, -, _ and /
    becomes "_"."""
    # a dot would end the key in a tar, where member names are KEY.EXTENSION
    name = unicodedata.normalize("NFC", name)
    stem = str(Path(name).with_suffix("")) if Path(name).suffix else name
    key = re.sub(r"[^\w/-]", "_", stem.lstrip("./"))
    if len(key.encode()) <= _MAX_KEY:
        return key
    # a hash keeps long names apart that share their beginning
    return f"{key.encode()[: _MAX_KEY - 9].decode(errors='ignore')}_{_hash(name)}"


def hashed_image_key(name: str) -> str:
    """The key of an image whose `image_key` another image has."""
    return f"{image_key(name)}-{_hash(name)}"


def unused_key(key: str, name: str, used: set[str]) -> str:
    """`key`, or one with a hash of the name if another sample has it; it is added to `used`."""
    if key in used:
        key = f"{key}-{_hash(name)}"
    numbers = (f"-{number}" for number in itertools.count(2))
    key = next(candidate for end in itertools.chain([""], numbers) if (candidate := key + end) not in used)
    used.add(key)
    return key


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]


# ---- contents of records -----------------------------------------------------------------------------------


def caption_texts(info: dict[str, Any]) -> list[str]:
    """All captions of a sample, long and short ones last; [] if it has none.

    Raises:
        BadSample: "captions" is not a list of texts.
    """
    captions = info.get("captions") or []
    if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
        raise BadSample(f"has captions {str(captions)[:60]}, expected a list of texts")
    return [*captions, *(info[n] for n in ("long_caption", "short_caption") if info.get(n))]


def image_names(record: Any) -> list[str]:
    """The names of a conversation's images; raises BadSample if they are malformed."""
    if not isinstance(record, dict):
        raise BadSample(f"is {type(record).__name__}, expected a mapping")
    named = record.get("image", record.get("images"))
    names = [] if named is None else named if isinstance(named, list) else [named]
    if not all(isinstance(name, str) and name for name in names):
        raise BadSample(f"names its images {named!r}, expected a name or a list of names")
    return names


def conversation_turns(record: dict[str, Any], num_images: int) -> list[dict[str, str]]:
    """[{"from": "human" | "gpt", "value"}] of a conversation; images come first if no turn has a placeholder.

    Raises:
        BadSample: the speakers do not alternate, or there are more or fewer placeholders than images.
    """
    given = record.get("conversations", record.get("messages"))
    if not isinstance(given, list) or not given:
        raise BadSample("has no conversations")
    turns: list[dict[str, str]] = []
    for number, turn in enumerate(given):
        # LLaVA writes from/value, chat templates role/content
        speaker = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
        text = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
        # as LLaVA does: an answer before the first question is dropped
        if _SPEAKERS.get(str(speaker)) == "gpt" and not turns:
            continue
        expected = ("human", "gpt")[len(turns) % 2]
        if _SPEAKERS.get(str(speaker)) != expected or not isinstance(text, str):
            raise BadSample(f"turn {number} is {str(turn)[:80]}: human and gpt must alternate")
        turns.append({"from": expected, "value": text})
    if not turns or len(turns) % 2:
        raise BadSample(f"has {len(turns)} turns, expected pairs of a question and an answer")
    # without placeholders the images come first; else there must be one per image
    marks = sum(turn["value"].count(_IMAGE_MARK) for turn in turns)
    if num_images and not marks:
        turns[0]["value"] = f"{_IMAGE_MARK}\n" * num_images + turns[0]["value"]
    elif marks != num_images:
        raise BadSample(f"marks {marks} image(s) in its text, but has {num_images}")
    return turns


def document_pieces(info: dict[str, Any], num_images: int) -> list[str | int]:
    """The texts and image numbers of an interleaved document; [] if the sample has none.

    Raises:
        BadSample: "document" is not a list of texts and of numbers below `num_images`.
    """
    document = info.get("document") or []
    if not isinstance(document, list):
        raise BadSample("has a document that is not a list")
    numbers = [piece for piece in document if not isinstance(piece, str)]
    if not all(isinstance(number, int) and 0 <= number < num_images for number in numbers):
        raise BadSample(f"names images {numbers} in its document, but has {num_images}")
    return document
