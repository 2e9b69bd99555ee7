"""Read the records of data sets: files of records, captions, conversations (LLaVA's JSON), documents.

Conversion, `unitok data check` and training share these functions, so that all three accept the same input.
"""

import hashlib
import itertools
import os
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from open_unitok.core.errors import UserError
from open_unitok.core.text_files import is_unicode, numbered_csv, numbered_json_lines, read_json

from .captions import caption_list
from .tar_index import BadSample, TarSample

TEXT_KEYS = ("text", "content")
_SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
_IMAGE_PARTS = ("image", "image_url")
_IMAGE_MARK = "<image>"
_MAX_KEY = 90  # a tar header has 100 bytes for a name, and an extension follows


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a .jsonl, .json (a list), .csv or .tsv file, one after the other.

    Raises:
        UserError: another extension, or a record that is malformed; the message names file and line.
    """
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        for number, record in numbered_csv(path, delimiter="," if suffix == ".csv" else "\t"):
            if None in record:  # a comma in a text without quotes would cut the text off
                raise UserError(f"{path}, line {number}, has more cells than the table has columns.")
            yield record
        return
    if suffix == ".json":
        records = read_json(path)
        if not isinstance(records, list):
            raise UserError(f"{path} holds {type(records).__name__}, expected a list of samples.")
        numbered: Iterable[tuple[int, Any]] = enumerate(records, 1)
    elif suffix == ".jsonl":
        numbered = numbered_json_lines(path)
    else:
        raise UserError(f"{path}: expected a .jsonl, .json, .csv or .tsv file.")
    for number, record in numbered:
        if not isinstance(record, dict):
            raise UserError(f"{path}, record {number}, is {type(record).__name__}, expected a mapping.")
        yield record


def find_label(info: dict[str, Any]) -> int | None:
    """The class of a sample: an integer of 0 or more under "label"; None without one."""
    label = info.get("label")
    whole = isinstance(label, int) and not isinstance(label, bool) and label >= 0
    return label if whole else None


def class_label(info: dict[str, Any]) -> int:
    """The class of a sample.

    Raises:
        BadSample: it has none.
    """
    label = find_label(info)
    if label is None:
        found = f"the label {str(info['label'])[:40]!r}" if "label" in info else "no label"
        raise BadSample(f"has {found}; expected an integer of 0 or more")
    return label


def with_label(record: TarSample, info: dict[str, Any]) -> dict[str, Any]:
    """`info` with the number in KEY.cls as its label, as ImageNet's webdatasets store it."""
    if "cls" not in record.members or "label" in info:
        return info
    text = record.text("cls").strip()
    return {**info, "label": int(text)} if text.isdecimal() else info


def check_facts(path: Path, facts: Any, kinds: dict[str, Any], remedy: str) -> dict[str, Any]:
    """A mapping in a .json that one of our commands wrote, whose values must have the types of `kinds`.

    Raises:
        UserError: they do not; `remedy` ends the message.
    """
    if not isinstance(facts, dict):
        raise UserError(f"{path} is damaged: it holds {str(facts)[:60]!r}, expected a mapping; {remedy}.")
    for key, kind in kinds.items():
        value = facts.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            expected = getattr(kind, "__name__", "a number")
            raise UserError(
                f"{path} is damaged: {key} is {str(value)[:60]!r}, expected {expected}; {remedy}."
            )
    return facts


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
        BadSample: the name leads out of the folder, or to a device, a FIFO or a folder.
    """
    # a root is where the folder seems to lie, or, behind links, does
    relative = image_name(name, (os.path.abspath(folder), os.path.realpath(folder)))
    if name.startswith("/") and not os.path.lexists(folder / relative):
        raise BadSample(f"names the image {name}, which is not below {folder} (--images)")
    forms = [folder / unicodedata.normalize(form, relative) for form in ("NFC", "NFD")]
    exact = folder / posixpath.normpath(name.lstrip("/"))
    path = next((path for path in (exact, *forms) if os.path.lexists(path)), forms[0])
    if os.path.lexists(path) and not os.path.isfile(path):
        raise BadSample(f"names the image {name}, which is not a file: {path}")
    return path


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
        key = hashed_image_key(name)
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
    others = [info[name] for name in ("long_caption", "short_caption") if info.get(name)]
    return caption_list([*caption_list(info.get("captions") or []), *others])


def image_names(record: Any) -> list[str]:
    """The names of a conversation's images; raises BadSample if they are malformed."""
    if not isinstance(record, dict):
        raise BadSample(f"is {type(record).__name__}, expected a mapping")
    named = record.get("image", record.get("images"))
    names = [] if named in (None, "") else named if isinstance(named, list) else [named]
    if not all(isinstance(name, str) and name for name in names):
        raise BadSample(f"names its images {named!r}, expected a name or a list of names")
    return names


def conversation_turns(record: dict[str, Any], num_images: int) -> list[dict[str, str]]:
    """[{"from": "human" | "gpt", "value"}] of a conversation, in pairs of a question and its answer.

    Questions in a row become one, as in the server; a system text comes before the first question. An answer
    before the first question and a question without an answer are left out. `<image>` in a question is an
    image; in an answer it is text. Images come first if no question has one.

    Raises:
        BadSample: it has no question with an answer, two answers in a row, an unknown speaker, a turn without
            text, or more or fewer images in its questions than `num_images`.
    """
    given = record.get("conversations", record.get("messages"))
    if not isinstance(given, list) or not given:
        raise BadSample("has no conversations")
    turns: list[dict[str, str]] = []
    system = ""
    for number, turn in enumerate(given):
        speaker, text = _speaker(turn), _turn_text(turn)
        if speaker is None or text is None:
            raise BadSample(
                f"turn {number} is {str(turn)[:80]}: expected a speaker ({', '.join(_SPEAKERS)}) and a text"
            )
        if not is_unicode(text):
            raise BadSample(f"turn {number} holds half of a surrogate pair")
        if speaker == "system":
            system += f"{text}\n"
        elif speaker == "human" and turns and turns[-1]["from"] == "human":
            turns[-1]["value"] += f"\n{text}"
        elif speaker == "gpt" and turns and turns[-1]["from"] == "gpt":
            raise BadSample(f"turn {number} is an answer after an answer: human and gpt must alternate")
        elif speaker == "human" or turns:  # as LLaVA does: an answer before the first question is dropped
            turns.append({"from": speaker, "value": text})
    if len(turns) % 2:  # there is nothing to learn after the last question
        turns.pop()
    if not turns:
        raise BadSample("has no question with an answer")
    # behind the images, as in the server
    images = re.match(f"(?:{_IMAGE_MARK}\\n)*", turns[0]["value"])[0]  # pyright: ignore[reportOptionalSubscript] # may match nothing
    turns[0]["value"] = images + system + turns[0]["value"].removeprefix(images)
    # without placeholders the images come first; else there must be one per image
    marks = sum(turn["value"].count(_IMAGE_MARK) for turn in turns[::2])
    if num_images and not marks:
        if any(_IMAGE_MARK in turn["value"] for turn in turns[1::2]):
            raise BadSample(f"has its {_IMAGE_MARK} in an answer, and answers are texts")
        turns[0]["value"] = f"{_IMAGE_MARK}\n" * num_images + turns[0]["value"]
    elif marks != num_images:
        raise BadSample(f"marks {marks} image(s) in its questions, but has {num_images}")
    return turns


def _speaker(turn: Any) -> str | None:
    """human, gpt or system; None for an unknown speaker."""
    # LLaVA writes from/value, chat templates role/content
    name = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
    return _SPEAKERS.get(name.lower()) if isinstance(name, str) else None


def _turn_text(turn: dict[str, Any]) -> str | None:
    """The text of a turn; the parts of a list (OpenAI's content) are joined, an image as its placeholder."""
    content = turn.get("value", turn.get("content"))
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    parts: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if kind == "text" else f"{_IMAGE_MARK}\n" if kind in _IMAGE_PARTS else None
        if not isinstance(text, str):
            return None
        parts.append(text)
    return "".join(parts)


def document_pieces(info: dict[str, Any], num_images: int) -> list[str | int]:
    """The texts and image numbers of an interleaved document; [] if the sample has none.

    Raises:
        BadSample: "document" is not a list of texts and of numbers below `num_images`.
    """
    document = info.get("document") or []
    if not isinstance(document, list):
        raise BadSample("has a document that is not a list")
    if not all(is_unicode(piece) for piece in document if isinstance(piece, str)):
        raise BadSample("has a document that holds half of a surrogate pair")
    numbers = [piece for piece in document if not isinstance(piece, str)]
    if not all(isinstance(number, int) and 0 <= number < num_images for number in numbers):
        raise BadSample(f"names images {numbers} in its document, but has {num_images}")
    return document
