"""The samples of a webdataset tar: `tarfile` parses the headers, and what is left out is counted and named.

Adjacent members with the same name up to the first dot are one sample, as in webdataset, except where that
would join samples whose names hold dots (see `_split`). Extraction, training and `unitok data check` share
these functions.
"""

import io
import os
import re
import tarfile
import threading
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from braceexpand import braceexpand

from open_unitok.core.errors import UserError
from open_unitok.core.image_names import IMAGE_SUFFIXES
from open_unitok.core.text_files import read_json, read_text

BLOCK = 512  # bytes: the unit of the tar format
MAX_HEADER = 1 << 20  # bytes of a long name or an extended header
MAX_TAIL = 1 << 26  # bytes that are read behind an end mark
MAX_FILES = 1_000_000  # of one brace pattern
_CODES = "codes.npy"  # an extension with a dot
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}  # magic numbers
# bad samples: the first ones are logged one by one, and their share is judged once enough were seen
LOGGED_BAD_SAMPLES, MIN_SEEN_FOR_BAD_SHARE = 10, 200
# reasons in `TarIndex.notes`
_HIDDEN, _LINK, _SPECIAL = (
    "hidden files left out",
    "links left out",
    "device files, FIFOs and unknown types left out",
)
_SPARSE, _UNNAMED = "sparse files left out", "files without a name or an extension left out"
_OUTSIDE = "names with .. left out"
_REPEATED = "keys that occur again, each a sample of its own (a sample's members must be adjacent)"


class BadSample(Exception):
    """A sample that cannot be used: counted, logged and skipped by the stream."""


class TarSample(NamedTuple):
    """One sample of a tar: its key, and the (offset, size) of its members, which are read on demand.

    `file` is the name of its first image; `contents` are those of a stream, which cannot be read again.
    """

    tar: str
    key: str
    members: dict[str, tuple[int, int]]
    source: str = ""
    file: str = ""
    contents: dict[str, bytes] | None = None

    def read(self, extension: str) -> bytes:
        """The bytes of the member `extension` ("png", "codes.npy").

        Raises:
            BadSample: there is no such member, or the tar ends before it does.
        """
        if extension not in self.members:
            raise BadSample(f"has no .{extension} (it has {', '.join(self.members)})")
        if self.contents is not None:
            return self.contents[extension]
        offset, size = self.members[extension]
        file = _open(self.tar)  # kept by this name while it is read
        data = os.pread(file.descriptor, size, offset)
        if len(data) != size:
            raise BadSample(f".{extension} is cut off")
        return data

    def text(self, extension: str) -> str:
        """The member as UTF-8 text; raises BadSample."""
        try:
            return read_text(self.read(extension), f".{extension}")
        except UserError as error:
            raise BadSample(str(error)) from error

    def json(self, extension: str = "json") -> Any:
        """The member as JSON; raises BadSample."""
        try:
            return read_json(self.read(extension), f".{extension}")
        except UserError as error:
            raise BadSample(str(error)) from error


class TarIndex(NamedTuple):
    """The samples of one tar, a description of its damage (None if there is none), and notes on its members:
    reason -> (count, the first one's name)."""

    samples: list[TarSample]
    problem: str | None
    notes: "Notes"


Notes = dict[str, tuple[int, str]]


def add_note(notes: Notes, reason: str, name: str, count: int = 1) -> None:
    """Count a member in `notes`."""
    found, first = notes.get(reason, (0, name))
    notes[reason] = (found + count, first)


def describe_notes(notes: Notes) -> str:
    """The notes as one line: "2 links left out (first: a.jpg); ..."."""
    return "; ".join(f"{count:,} {reason} (first: {name})" for reason, (count, name) in notes.items())


class _OpenFile:
    """A file descriptor that is closed when nobody, in any thread, reads from it any more."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self):
        if "descriptor" in self.__dict__:
            os.close(self.descriptor)


_OPEN: dict[str, _OpenFile] = {}
_OPEN_LOCK = threading.Lock()
_MAX_OPEN = 64


def _open(path: str) -> _OpenFile:
    """A file for reading; a limited number stays open."""
    with _OPEN_LOCK:
        if path not in _OPEN:
            if len(_OPEN) == _MAX_OPEN:  # drop the one opened first
                _OPEN.pop(next(iter(_OPEN)))
            _OPEN[path] = _OpenFile(path)
        return _OPEN[path]


def scan_tar(path: str, source: str = "") -> TarIndex:
    """The samples of a tar on disk, by a scan of its headers.

    Raises:
        UserError: the file is compressed.
    """
    stat = os.stat(path)
    return _index(path, source, stat.st_size, stat.st_mtime_ns)


# size and time are part of the cache key: a tar that was rewritten is scanned again
@lru_cache(maxsize=16)
def _index(path: str, source: str, size: int, _changed: int) -> TarIndex:
    with _OPEN_LOCK:
        _OPEN.pop(path, None)  # may refer to an older file of this name
    samples: list[TarSample] = []
    notes: Notes = {}
    problem = None
    try:
        with open(path, "rb") as file:
            if kind := compression(file.read(BLOCK)):
                raise UserError(f"{path} is compressed ({kind}): unpack it, as members are read in place.")
            file.seek(0)
            samples.extend(iter_samples(TarReader(file, size), path, source, notes))
    except (OSError, BrokenTar) as error:
        problem = str(error)
    return TarIndex(samples, problem, notes)


def compression(head: bytes) -> str | None:
    """The name of the compression that the first bytes of a file are of."""
    return next((kind for magic, kind in COMPRESSED.items() if head.startswith(magic)), None)


# ---- members -----------------------------------------------------------------------------------------------


class BrokenTar(Exception):
    """A tar is damaged; the samples before the damage are valid."""


class Member(NamedTuple):
    """A regular file in a tar; `data` only if the tar is a stream."""

    name: str
    offset: int
    size: int
    data: bytes | None


class TarReader:
    """The bytes of a tar from first to last, as a file object for `tarfile`.

    Args:
        total: size of a file that can seek; None: a stream, whose members are read when they are passed.
    """

    def __init__(self, file: io.BufferedIOBase, total: int | None = None):
        self.file, self.total, self.position = file, total, 0
        self.block = b""  # what was read last

    def tell(self) -> int:
        return self.position

    def seek(self, target: int) -> None:
        """Move forward; a header that points backwards would be read for ever."""
        if target < self.position:
            raise BrokenTar(f"the header before byte {self.position} points backwards")
        if self.total is not None:
            if target > self.total:
                raise BrokenTar(f"it ends at byte {self.total} without an end mark")
            self.file.seek(target)
            self.position = target
        while self.position < target and self._read(min(target - self.position, 1 << 20)):
            pass

    def read(self, size: int) -> bytes:
        """A part of a header; a damaged one may ask for any number of bytes."""
        if not 0 <= size <= MAX_HEADER:
            raise BrokenTar(f"the header at byte {self.position - BLOCK} is damaged: it claims {size} bytes")
        self.block = self._read(size)
        return self.block

    def contents(self, size: int) -> bytes:
        """The next `size` bytes; raises BrokenTar if the tar ends before."""
        data = self._read(size)
        if len(data) < size:
            raise BrokenTar(f"it ends at byte {self.position} inside a member of {size} bytes")
        return data

    def check_tail(self) -> None:
        """Raises BrokenTar if there is more than zeros behind the end mark."""
        end = self.position
        while self.position - end < MAX_TAIL and (data := self._read(1 << 16)):
            if data.strip(b"\0"):
                raise BrokenTar(f"the end mark at byte {end} is followed by more data (several tars in one?)")

    def _read(self, size: int) -> bytes:
        parts = []
        while size > 0 and (data := self.file.read(min(size, 1 << 24))):
            parts.append(data)
            size -= len(data)
            self.position += len(data)
        return b"".join(parts)


# `tarfile` raises others than its own on damaged headers
_TARFILE_ERRORS = (
    tarfile.TarError, ValueError, ArithmeticError, LookupError, TypeError, RecursionError, MemoryError,
)  # fmt: skip


def _members(reader: TarReader, notes: Notes) -> Iterator[Member]:
    """The regular files; raises BrokenTar with the byte where the tar breaks."""
    end = 0
    try:
        tar = tarfile.TarFile(fileobj=reader, encoding="utf-8", errors="surrogateescape")  # type: ignore[arg-type]
        while info := tar.next():
            tar.members.clear()  # pyright: ignore # it would keep all of them
            if info.size < 0 or tar.offset <= end:
                raise BrokenTar(f"the member at byte {end} has a size of {info.size} bytes")
            end = tar.offset
            # a name that is not UTF-8 keeps its bytes in a readable form
            name = info.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            if reason := _left_out(info, name):
                add_note(notes, reason, name)
            elif info.isreg():
                if reader.total is not None and info.offset_data + info.size > reader.total:
                    raise BrokenTar(f"it ends at byte {reader.total} inside a member of {info.size} bytes")
                data = None if reader.total is not None else reader.contents(info.size)
                yield Member(name, info.offset_data, info.size, data)
    except _TARFILE_ERRORS as error:
        if not reader.position:
            raise BrokenTar("it is empty") from error
        if str(error) == "unexpected end of data":
            raise BrokenTar(
                f"it ends at byte {reader.total or reader.position} without an end mark"
            ) from error
        raise BrokenTar(f"the header at byte {end} is damaged ({error})") from error
    # tarfile takes a damaged header for the end
    if len(reader.block) < BLOCK:
        raise BrokenTar(f"it ends at byte {reader.position} without an end mark")
    if reader.block.strip(b"\0"):
        raise BrokenTar(f"the header at byte {end} is damaged")
    reader.check_tail()


def _left_out(info: tarfile.TarInfo, name: str) -> str | None:
    """Why a member is no part of a sample; None for regular files and folders."""
    if info.issym() or info.islnk():
        return _LINK
    if not info.isreg():
        return None if info.isdir() else _SPECIAL
    if info.issparse():
        return _SPARSE
    parts = [part for part in name.split("/") if part != "."]
    if ".." in parts:
        return _OUTSIDE
    # macOS stores attributes of x.jpg in ._x.jpg
    if any(part.startswith(".") or part == "__MACOSX" for part in parts):
        return _HIDDEN
    return None if "." in parts[-1] else _UNNAMED


# ---- samples -----------------------------------------------------------------------------------------------


def iter_samples(reader: TarReader, tar: str, source: str, notes: Notes) -> Iterator[TarSample]:
    """The samples of a tar in order; raises BrokenTar where it breaks, after the last intact sample."""
    seen: set[str] = set()
    for stem, group in _adjacent(_members(reader, notes)):
        for key, members in _split(stem, group):
            if key in seen:
                add_note(notes, _REPEATED, key)
            seen.add(key)
            image = next((m.name for e, m in members.items() if _is_image(e)), "")
            contents = {e: m.data for e, m in members.items() if m.data is not None}
            offsets = {e: (m.offset, m.size) for e, m in members.items()}
            yield TarSample(
                tar, key, offsets, source, _relative(image), contents if reader.total is None else None
            )


def _relative(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _adjacent(members: Iterable[Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """(name up to the first dot, rest of the name in lower case -> member); a repeated name starts anew."""
    stem, group = "", {}
    broken = None
    try:
        for member in members:
            folder, base = os.path.split(_relative(member.name))
            start, _, rest = base.partition(".")
            # webdataset splits at the first dot: a.codes.npy has the key a
            this, rest = os.path.join(folder, start), rest.lower()
            if group and (this != stem or rest in group):
                yield stem, group
                group = {}
            stem = this
            group[rest] = member
    except BrokenTar as error:
        broken = error
    if group:
        yield stem, group
    if broken:
        raise broken


def _split(stem: str, group: dict[str, Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """The samples in a group with one stem.

    KEY.jpg with KEY.seg.png is one, and KEY.0.jpg, KEY.1.jpg with KEY.json; 2024.01.jpg, 2024.01.txt,
    2024.02.jpg, ... are several.
    """
    # middle of the name ("", "0", "seg", "v1.0") -> extension -> member
    middles: dict[str, dict[str, Member]] = {}
    for rest, member in group.items():
        middle = _middle(rest)
        middles.setdefault(middle, {})[rest[len(middle) :].lstrip(".")] = member
    plain = middles.pop("", None)
    with_images = {m for m, parts in middles.items() if any(e == _CODES or _is_image(e) for e in parts)}
    numbered = [m for m in with_images if m.isdecimal()]
    several = plain is not None and not any(_is_image(extension) for extension in plain)
    # the images of one sample, or frames that are samples
    joined = several and all(len(middles[m]) == 1 for m in numbered)
    own = {m for m in with_images if len(middles[m]) > 1 or (m in numbered and not joined)}
    if plain is None:
        own = set(middles)
    shared = {rest: member for rest, member in group.items() if _middle(rest) not in own}
    samples = [(stem, shared)] if shared else []
    yield from (*samples, *((f"{stem}.{middle}", middles[middle]) for middle in middles if middle in own))


def _middle(rest: str) -> str:
    """What stands between the first dot of a name and its extension: "" in a.png, "seg" in a.seg.png."""
    return rest.removesuffix(_CODES).rstrip(".") if rest.endswith(_CODES) else rest.rpartition(".")[0]


def _is_image(extension: str) -> bool:
    return f".{extension.rpartition('.')[2]}" in IMAGE_SUFFIXES


def image_members(sample: TarSample) -> tuple[list[str], dict[str, Any]]:
    """Image members in the order of their numbers, and the info; raises BadSample if an image is missing."""
    info = sample.json("json") if "json" in sample.members else {}
    if not isinstance(info, dict):
        raise BadSample(f".json holds {type(info).__name__}, expected a mapping")
    single = [e for e in sample.members if f".{e}" in IMAGE_SUFFIXES]
    if len(single) > 1:
        raise BadSample(f"has {len(single)} images of one name (.{', .'.join(single)}), expected one")
    parts = [(member, *member.partition(".")[::2]) for member in sample.members]
    # KEY.0.jpg, KEY.1.jpg, ...
    numbered = [(int(n), m) for m, n, ending in parts if n.isdecimal() and f".{ending}" in IMAGE_SUFFIXES]
    members = single or [member for _, member in sorted(numbered)]
    if len(members) != info.get("images", max(1, len(members))):
        raise BadSample(f"has {', '.join(sample.members)}, expected {info.get('images', 1)} image(s)")
    return members, info


def matching_files(pattern: str | list[str], where: str = "data.sources") -> list[str]:
    """The files that match globs and {000..127} braces, sorted; `where` begins an error text.

    Raises:
        UserError: a pattern matches nothing; the message names it.
    """
    found: list[str] = []
    for part in expand_braces(pattern, where):
        path = Path(os.path.expanduser(part))
        # a file of this very name comes before what the pattern matches
        matches = [str(path)] if os.path.lexists(path) else []
        if not matches:
            matches = sorted(str(p) for p in Path(path.anchor).glob(str(path.relative_to(path.anchor))))
        if not matches:
            raise UserError(f"{where}: no file matches {part}.")
        for match in matches:
            if not (os.path.isfile(match) or os.path.isdir(match)):
                raise UserError(f"{where}: {match} is a device, a FIFO or a broken link, expected a file.")
        found += [match for match in matches if os.path.isfile(match)]
    if not found:
        raise UserError(f"{where}: {pattern} matches folders only: give files, e.g. {pattern}/*.tar.")
    return sorted(set(found))


def expand_braces(pattern: str | list[str], where: str) -> list[str]:
    """All patterns with {a,b} and {000..127} written out."""
    found: list[str] = []
    for text in [pattern] if isinstance(pattern, str) else pattern:
        if os.path.exists(text):  # a file with braces in its name
            found.append(text)
            continue
        too_many = UserError(f"{where}: {text} stands for more than {MAX_FILES:,} files.")
        # braceexpand writes a range out before it returns
        for first, last in re.findall(r"\{(-?\d+)\.\.(-?\d+)", text):
            if abs(int(first[:20]) - int(last[:20])) > MAX_FILES:
                raise too_many
        try:
            for part in braceexpand(text):
                found.append(part)
                if len(found) > MAX_FILES:
                    raise too_many
        except ValueError as error:
            raise UserError(f"{where}: the braces in {text} do not match: {error}.") from error
    return found
