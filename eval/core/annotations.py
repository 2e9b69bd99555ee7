"""Annotation files: read, and checked entry by entry.

A malformed entry is replaced by a UserError that describes the problem: its sample is not answered and counts
as wrong, and the run continues.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing
from open_unitok.core.text_files import numbered_json_lines, read_json

from .benchmark import Record, Sample


def read_llava_questions(path: Path, limit: int | None = None) -> list[Any]:
    """The lines of a LLaVA question file, each with "question_id", "text", and "image" if it has one.

    A malformed line becomes a UserError that names the missing key.
    """
    # cut before the check: --limit counts lines of the file, malformed ones included
    return [
        validate_record(row, f"{path}, line {number}", ("question_id",), ("text",))
        for number, row in itertools.islice(numbered_json_lines(path, lenient=True), limit)
    ]


def llava_ids(rows: Sequence[Any]) -> list[Any]:
    """The question ids of the lines of a LLaVA question file; None for a malformed line."""
    return [row["question_id"] if isinstance(row, dict) else None for row in rows]


def part_asked(asked: Iterable[Any], released: Iterable[Any], file: Path) -> str:
    """Why the questions of LLaVA's file are not those of the release, by their ids; "" if they are."""
    asked, released = Counter(asked), Counter(released)
    left_out, repeated = (released - asked).total(), (asked - released).total()
    counts = ((left_out, f"not in {file.name}"), (repeated, f"asked twice in {file.name}"))
    return "; ".join(
        f"{count} of {released.total()} released questions are {what}" for count, what in counts if count
    )


def read_json_as(kind: type, path: Path, key: str = "") -> Any:
    """Read a JSON file, or one key of it, and check that it is an object (`dict`) or a list.

    Raises:
        UserError: the value has another type.
    """
    value = read_json(path)
    if not key:
        return require_type(kind, value, path)
    return require_type(kind, require_key(value, key, path), f"{path}, {key}")


# ------------------------------------------------------------------------------------------------- one entry


def require_key(row: Any, key: str, where: str | Path) -> Any:
    """`row[key]`.

    Raises:
        UserError: the key is missing, or `row` itself is a UserError.
    """
    # lenient readers return a UserError in place of a line that is not JSON
    if isinstance(row, UserError):
        raise row
    if not isinstance(row, dict) or key not in row:
        raise UserError(f"{where}: the key {key!r} is missing.")
    return row[key]


def require_text(row: Any, key: str, where: str) -> str:
    """`row[key]`, which must be a non-empty string, else UserError."""
    value = require_key(row, key, where)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {key} is {value!r}; it must be a non-empty text.")
    return value


def require_type(kind: type, value: Any, where: str | Path) -> Any:
    """`value`, which must be an object (`dict`), a list or a text (`str`), else UserError."""
    if not isinstance(value, kind):
        # the words of JSON, not of Python: the reader edits a JSON file
        words = {dict: "an object", list: "a list", str: "a text"}
        raise UserError(f"{where}: expected {words[kind]}, got {type(value).__name__}.")
    return value


def validate_record(row: Any, where: str, keys: Sequence[str] = (), texts: Sequence[str] = ()) -> Any:
    """The row if it is valid, else a UserError, which is returned, not raised.

    Args:
        keys: must hold a string or an integer.
        texts: must hold a non-empty string.
    """
    try:
        for key in keys:
            if not isinstance(require_key(row, key, where), str | int):
                raise UserError(f"{where}: {key} is {row[key]!r}; it must be a text or an integer.")
        for key in texts:
            require_text(row, key, where)
    except UserError as error:
        return error
    return row


def require_mostly_valid(samples: Sequence[Sample], path: Path) -> list[Sample]:
    """Return the samples unchanged.

    Raises:
        UserError: there are none, or more than half of them are malformed.
    """
    # a few bad entries are data errors; a majority means the wrong file
    malformed = [s.malformed for s in samples if s.malformed]
    if not samples:
        raise UserError(f"{path} is empty.")
    if len(malformed) > len(samples) / 2:
        raise UserError(
            f"{path}: {len(malformed)} of {len(samples)} entries are malformed, so it seems to be another "
            f"kind of file. The first: {malformed[0]}"
        )
    return list(samples)


# ---------------------------------------------------------------------------------------------------- scenes


class SceneAnnotation(NamedTuple):
    """An image file and its objects, each with "shape", "color", "cell" and "box"."""

    file: str
    objects: list[dict[str, Any]]


def read_scenes(path: Path) -> list[SceneAnnotation | UserError]:
    """The images of the `captions.json` of a scenes data set; a malformed entry becomes a UserError.

    Raises:
        UserError: the file is missing or not a list.
    """
    found: list[SceneAnnotation | UserError] = []
    for i, row in enumerate(read_json_as(list, existing(path))):
        where = f"{path}, entry {i}"
        try:
            found.append(_read_scene(row, where))
        except UserError as error:
            found.append(error)
    return found


def _read_scene(row: Record, where: str) -> SceneAnnotation:
    file, scene = require_text(row, "file", where), require_key(row, "scene", where)
    objects = require_type(list, require_key(scene, "objects", f"{where}, scene"), f"{where}, objects")
    for j, item in enumerate(objects):
        item_where = f"{where}, objects[{j}]"
        for key in ("shape", "color"):
            require_text(item, key, item_where)
        # cell is (row, column), box is x0, y0, x1, y1 in pixels
        for key, count in (("cell", 2), ("box", 4)):
            numbers = require_type(list, require_key(item, key, item_where), f"{item_where}, {key}")
            if len(numbers) != count or not all(isinstance(n, int | float) for n in numbers):
                raise UserError(f"{item_where}: {key} is {numbers!r}; it must be {count} numbers.")
    return SceneAnnotation(file, objects)
