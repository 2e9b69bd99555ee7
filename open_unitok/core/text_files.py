"""Read text that users wrote: the one place where bytes become text, lines, JSON or CSV records.

Text is UTF-8, with or without a byte-order mark; other encodings are refused by name. A line ends at a line
feed, with or without a carriage return, and nowhere else: captions hold the other characters at which
`str.splitlines` splits (U+2028, U+0085, ...). A source is a path (also a FIFO or /dev/stdin) or bytes, which
`name` names in errors.
"""

import csv
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import existing

TextSource = str | Path | bytes

_BOM = b"\xef\xbb\xbf"
# UTF-32 first: its little-endian mark begins with that of UTF-16
_OTHER_FORMATS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x1f\x8b": "compressed (gzip)",
    b"PK\x03\x04": "a zip archive",
}


def read_text(source: TextSource, name: str = "The text") -> str:
    """The whole text.

    Raises:
        UserError: the file is missing, a folder or unreadable, or it is not UTF-8; the message names file,
            line and byte.
    """
    return decode_text(_read(source, name), _label(source, name))


def numbered_lines(source: TextSource, name: str = "The text") -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end) of every line, blank ones included, read one by one.

    Raises:
        UserError: as `read_text`.
    """
    for number, line in _raw_lines(source, name):
        yield number, decode_text(line, _label(source, name), number).removesuffix("\n").removesuffix("\r")


def read_lines(source: TextSource, name: str = "The text") -> list[str]:
    """The lines that are not blank, without their ends.

    Raises:
        UserError: as `read_text`.
    """
    return [line for _, line in numbered_lines(source, name) if line.strip()]


def read_json(source: TextSource, name: str = "The text") -> Any:
    """The value of a JSON text.

    Raises:
        UserError: as `read_text`, or it is not valid JSON.
    """
    return parse_json(read_text(source, name), _label(source, name))


def numbered_json_lines(
    source: TextSource, name: str = "The text", lenient: bool = False
) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of JSON lines, read one by one; blank lines are skipped.

    Args:
        lenient: an invalid line becomes a UserError in place of its value.

    Raises:
        UserError: as `read_text`, or a line is not valid JSON.
    """
    label = _label(source, name)
    for number, line in _raw_lines(source, name):
        try:
            text = decode_text(line, label, number)
            if text.strip():
                yield number, parse_json(text, f"{label}, line {number},")
        except UserError as error:
            if not lenient:
                raise
            yield number, error


def read_json_lines(source: TextSource, name: str = "The text", lenient: bool = False) -> list[Any]:
    """The values of `numbered_json_lines`."""
    return [value for _, value in numbered_json_lines(source, name, lenient)]


def numbered_csv(
    source: TextSource, name: str = "The text", delimiter: str = ",", columns: Iterable[str] = ()
) -> Iterator[tuple[int, dict[Any, Any]]]:
    """(number of its last line, record) of a table whose first line holds the column names, read one by one.

    A record with more cells than columns holds the rest as a list under None; missing cells are None.

    Args:
        columns: those that the table must have.

    Raises:
        UserError: as `read_text`, a line is not valid CSV, or a column is missing.
    """
    # cells may hold images as base64; the default limit is 128 KiB
    csv.field_size_limit(2**31 - 1)
    label, number = _label(source, name), 0

    def lines() -> Iterator[str]:
        nonlocal number
        # lines keep their ends: one inside quotes belongs to the cell
        for number, line in _raw_lines(source, name):
            yield decode_text(line, label, number)

    table = csv.DictReader(lines(), delimiter=delimiter)
    try:
        if missing := [column for column in columns if column not in (table.fieldnames or ())]:
            raise UserError(f"{label} has no column {missing[0]!r}.")
        for record in table:
            yield number, record
    except csv.Error as error:
        raise UserError(f"{label}, line {number}, is not valid CSV: {error}.") from error


def read_csv(
    source: TextSource, name: str = "The text", delimiter: str = ",", columns: Iterable[str] = ()
) -> Iterator[dict[Any, Any]]:
    """The records of `numbered_csv`."""
    return (record for _, record in numbered_csv(source, name, delimiter, columns))


def is_unicode(text: str) -> bool:
    """False for a text with half of a surrogate pair, which JSON can write and no tokenizer can read."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _label(source: TextSource, name: str) -> str:
    return name if isinstance(source, bytes) else str(source)


def parse_json(text: str, name: str) -> Any:
    """The value of a JSON text.

    Raises:
        UserError: it is not valid JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not valid JSON: {error}") from error


def _file(path: str | Path) -> Path:
    """An existing path that is not a folder; a FIFO or a device is a file."""
    if os.path.isdir(existing(path)):
        raise UserError(f"{path} is a folder, expected a text file.")
    return Path(path)


def _read(source: TextSource, name: str) -> bytes:
    """The bytes of a source without a byte-order mark."""
    if isinstance(source, bytes):
        data = source
    else:
        try:
            data = _file(source).read_bytes()
        except OSError as error:
            raise UserError(f"{source} cannot be read: {error.strerror}.") from error
    return without_mark(data, _label(source, name))


def _raw_lines(source: TextSource, name: str) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line with its end), read one by one, without a byte-order mark."""
    if isinstance(source, bytes):
        for number, line in enumerate(_read(source, name).removesuffix(b"\n").split(b"\n"), 1):
            yield number, line + b"\n"
        return
    try:
        with open(_file(source), "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, without_mark(line, str(source)) if number == 1 else line
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror}.") from error


def without_mark(data: bytes, name: str) -> bytes:
    """The beginning of a text without UTF-8's byte-order mark.

    Raises:
        UserError: it is the beginning of another format.
    """
    for mark, kind in _OTHER_FORMATS.items():
        if data.startswith(mark):
            raise UserError(f"{name} is {kind}, expected UTF-8 text: convert it first.")
    return data.removeprefix(_BOM)


def decode_text(data: bytes, name: str, first_line: int = 1) -> str:
    """UTF-8 bytes as text; `first_line` is the number of their first line in the file `name`.

    Raises:
        UserError: as `read_text`.
    """
    try:
        if b"\0" not in data:
            return data.decode()
        place, reason = data.index(b"\0"), "holds a NUL byte: it is UTF-16 or binary."
    except UnicodeDecodeError as error:
        place, reason = error.start, f"is not UTF-8: {error.reason} (0x{data[error.start]:02x})."
    line, byte = first_line + data.count(b"\n", 0, place), place - data.rfind(b"\n", 0, place)
    raise UserError(f"{name}, line {line}, byte {byte}, {reason}")
