"""Byte offsets of the samples of a webdataset tar, by a scan of its headers that locates damage exactly."""

import json
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from braceexpand import braceexpand

from open_unitok.core.errors import UserError

BLOCK = 512  # bytes: the unit of the tar format
IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp")
# bad samples: the first ones are logged one by one, and their share is judged once enough were seen
LOGGED_BAD_SAMPLES, MIN_SEEN_FOR_BAD_SHARE = 10, 200


class BadSample(Exception):
    """A sample that cannot be used: counted, logged and skipped by the stream."""


class TarSample(NamedTuple):
    """One sample of a tar: its key, and the (offset, size) of its members, which are read on demand."""

    tar: str
    key: str
    members: dict[str, tuple[int, int]]
    source: str = ""

    def read(self, extension: str) -> bytes:
        """The bytes of the member `extension` ("png", "codes.npy").

        Raises:
            BadSample: there is no such member, or the tar ends before it does.
        """
        if extension not in self.members:
            raise BadSample(f"has no .{extension} (it has {', '.join(self.members)})")
        offset, size = self.members[extension]
        data = os.pread(_open(self.tar), size, offset)
        if len(data) != size:
            raise BadSample(f".{extension} is cut off")
        return data

    def text(self, extension: str) -> str:
        """The member as UTF-8 text; raises BadSample."""
        try:
            return self.read(extension).decode()
        except UnicodeDecodeError as error:
            raise BadSample(f".{extension} is not UTF-8: {error}") from error

    def json(self, extension: str = "json") -> Any:
        """The member as JSON; raises BadSample."""
        try:
            return json.loads(self.read(extension))
        except ValueError as error:
            raise BadSample(f".{extension} is not JSON: {error}") from error


class TarIndex(NamedTuple):
    """The samples of one tar, and a description of its damage (None if there is none)."""

    samples: list[TarSample]
    problem: str | None


_OPEN: dict[str, int] = {}  # path -> file descriptor
_MAX_OPEN = 64


def _open(path: str) -> int:
    """A file descriptor for reading; a limited number stays open."""
    if path not in _OPEN:
        if len(_OPEN) == _MAX_OPEN:  # close the one opened first
            os.close(_OPEN.pop(next(iter(_OPEN))))
        _OPEN[path] = os.open(path, os.O_RDONLY)
    return _OPEN[path]


def scan_tar(path: str, source: str = "") -> TarIndex:
    """Scan the headers of a tar; adjacent members with the same name up to the first dot are one sample.

    Raises:
        UserError: the file is compressed.
    """
    stat = os.stat(path)
    return _index(path, source, stat.st_size, stat.st_mtime_ns)


# size and time are part of the cache key: a tar that was rewritten is scanned again
@lru_cache(maxsize=16)
def _index(path: str, source: str, _size: int, _changed: int) -> TarIndex:
    if path in _OPEN:  # may refer to an older file of this name
        os.close(_OPEN.pop(path))
    samples: list[TarSample] = []
    problem = None
    try:
        for name, offset, size in _members(path):
            folder, base = os.path.split(name)
            # webdataset splits at the first dot: a.codes.npy has the key a
            stem, _, extension = base.partition(".")
            key = os.path.join(folder, stem)
            if not samples or samples[-1].key != key:
                samples.append(TarSample(path, key, {}, source))
            samples[-1].members[extension.lower()] = (offset, size)
    except (OSError, _Broken) as error:
        problem = str(error)
    return TarIndex(samples, problem)


class _Broken(Exception):
    pass


def _members(path: str) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of every regular file; raises _Broken with the byte where the tar breaks."""
    total = os.path.getsize(path)
    long_name = ""
    with open(path, "rb") as file:
        offset = 0
        while True:
            file.seek(offset)
            header = file.read(BLOCK)
            if offset == 0 and header[:2] == b"\x1f\x8b":
                raise UserError(f"{path} is compressed: unpack it (gunzip), as members are read in place.")
            if len(header) < BLOCK:
                raise _Broken(f"it ends at byte {total} without an end mark")
            if not header.strip(b"\0"):  # the end mark: blocks of zeros
                return
            size = _header_size(header, offset)
            data = offset + BLOCK
            if data + size > total:
                raise _Broken(f"it ends at byte {total} inside a member of {size} bytes")
            kind = header[156:157]
            if kind == b"L":  # GNU: a name that is too long for the next member's header
                long_name = file.read(size).rstrip(b"\0").decode(errors="replace")
            elif kind == b"x":  # POSIX: the same as a key=value record
                long_name = _pax_path(file.read(size)) or long_name
            elif kind in (b"0", b"\0"):
                yield long_name or _header_name(header), data, size
                long_name = ""
            # contents are padded to whole blocks
            offset = data + (size + BLOCK - 1) // BLOCK * BLOCK


def _header_size(header: bytes, offset: int) -> int:
    """The size field, once the checksum is verified."""
    try:
        wanted = int(header[148:156].strip(b"\0 ") or b"0", 8)
        if header[124] & 0x80:  # GNU: sizes of 8 GiB and more are binary
            size = int.from_bytes(header[125:136], "big")
        else:
            size = int(header[124:136].strip(b"\0 ") or b"0", 8)
    except ValueError:
        raise _Broken(f"the header at byte {offset} is damaged") from None
    # the checksum is computed with its own 8 bytes as spaces
    if wanted != sum(header[:148]) + 8 * 32 + sum(header[156:]):
        raise _Broken(f"the header at byte {offset} is damaged")
    return size


def _header_name(header: bytes) -> str:
    name = header[:100].rstrip(b"\0").decode(errors="replace")
    prefix = header[345:500].rstrip(b"\0").decode(errors="replace") if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _pax_path(data: bytes) -> str | None:
    """The path of a POSIX extended header: samples "LENGTH key=value\\n"."""
    for line in data.split(b"\n"):
        key, _, value = line.partition(b" ")[2].partition(b"=")
        if key == b"path":
            return value.decode(errors="replace")
    return None


def image_members(sample: TarSample) -> tuple[list[str], dict[str, Any]]:
    """Image members in the order of their numbers, and the info; raises BadSample if an image is missing."""
    info = sample.json("json") if "json" in sample.members else {}
    if not isinstance(info, dict):
        raise BadSample(f".json holds {type(info).__name__}, expected a mapping")
    if "captions" not in info and "txt" in sample.members:
        info["captions"] = [sample.text("txt")]
    single = next((e for e in IMAGE_EXTENSIONS if e in sample.members), None)
    parts = [(member, *member.partition(".")[::2]) for member in sample.members]
    # KEY.0.jpg, KEY.1.jpg, ...
    numbered = [(int(n), m) for m, n, ending in parts if n.isdecimal() and ending in IMAGE_EXTENSIONS]
    members = [single] if single else [member for _, member in sorted(numbered)]
    if len(members) != info.get("images", max(1, len(members))):
        raise BadSample(f"has {', '.join(sample.members)}, expected {info.get('images', 1)} image(s)")
    return members, info


def matching_files(pattern: str | list[str], where: str = "data.sources") -> list[str]:
    """The files that match globs and {000..127} braces, sorted; `where` begins an error text.

    Raises:
        UserError: a pattern matches nothing; the message names it.
    """
    found: list[str] = []
    for text in [pattern] if isinstance(pattern, str) else pattern:
        for part in braceexpand(os.path.expanduser(text)):
            path = Path(part)
            matches = sorted(str(p) for p in Path(path.anchor).glob(str(path.relative_to(path.anchor))))
            if not matches:
                raise UserError(f"{where}: no file matches {part}.")
            found += [match for match in matches if os.path.isfile(match)]
    if not found:
        raise UserError(f"{where}: {pattern} matches folders only: give files, e.g. {pattern}/*.tar.")
    return sorted(set(found))
