"""Where tars come from and go to: files, `pipe:` commands, URLs and stdin by streaming; webdataset's writer.

A stream is read from its first byte to its last, so its samples carry their contents. What may be streamed is
what the user wrote on the command line or in a YAML: `pipe:` runs a command, so no file that may come from
elsewhere (codes.json, a run directory, a model folder) reaches these functions.
"""

import bz2
import contextlib
import gzip
import hashlib
import http.client
import io
import lzma
import os
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterator, Mapping
from typing import IO, Any

from open_unitok.core.errors import UserError

from .tar_index import (
    BrokenTar,
    Notes,
    TarReader,
    TarSample,
    compression,
    expand_braces,
    iter_samples,
    matching_files,
)

STDIN = ("-", "/dev/stdin")
URL_SCHEMES = ("http", "https")
# read by programs that webdataset calls, which must be installed
COMMAND_SCHEMES = ("pipe", "gs", "hf", "ais", "sftp", "scp")
TRIES, SILENCE, PAUSE = (
    4,
    60.0,
    0.5,
)  # per URL; seconds that a source may be silent; seconds before the first new try
_UNPACK = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
_SIGNATURES = ("x-amz-", "x-goog-", "sig", "expires", "key-pair-id", "policy", "token", "awsaccesskeyid")
_RETRIED_STATUS = (408, 425, 429, 500, 502, 503, 504)


def matching_shards(pattern: str | list[str], where: str = "data.sources") -> list[str]:
    """As `matching_files`, but URLs, `pipe:` commands and - (stdin) may be among the patterns.

    Raises:
        UserError: a pattern matches nothing, or its scheme is not known.
    """
    patterns = [pattern] if isinstance(pattern, str) else pattern
    found: list[str] = []
    for text in patterns:
        scheme = _scheme(text)
        if scheme or text in STDIN:
            if scheme and scheme not in (*URL_SCHEMES, *COMMAND_SCHEMES):
                known = ", ".join((*URL_SCHEMES, *COMMAND_SCHEMES))
                raise UserError(f"{where}: {text} has the scheme {scheme!r}; it must be one of {known}.")
            found += expand_braces(text, where)
        else:
            found += matching_files(text, where)
    return sorted(set(found))


def _scheme(source: str) -> str:
    """The scheme of a URL or of pipe:COMMAND, else ""."""
    if source.startswith("pipe:"):
        return "pipe"
    scheme, mark, _ = source.partition("://")
    return scheme.lower() if mark and scheme.isalnum() else ""


def is_url(source: str) -> bool:
    """Whether a source is a URL or a command, not a file."""
    return bool(_scheme(source))


def is_stream(source: str) -> bool:
    """Whether a source can only be read from its beginning: a URL, a command, stdin, or a compressed file."""
    if _scheme(source) or source in STDIN:
        return True
    if os.path.isdir(source):  # its reader says that it is none
        return False
    with open(source, "rb") as file:
        return compression(file.read(6)) is not None


def shown(source: str) -> str:
    """A source as it may be printed and stored: a URL without its user, password and query."""
    if _scheme(source) in ("", "pipe"):
        return source
    parts = urllib.parse.urlsplit(source)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def source_name(source: str) -> str:
    """What identifies a source where it is stored; passwords and signatures are not."""
    if source.startswith("pipe:"):
        return f"pipe:{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    query = urllib.parse.parse_qsl(urllib.parse.urlsplit(source).query, keep_blank_values=True)
    # signed again, a URL names the same file
    kept = [part for part in query if not part[0].lower().startswith(_SIGNATURES)]
    return f"{shown(source)}{f'?{hashlib.sha256(repr(kept).encode()).hexdigest()[:8]}' if kept else ''}"


class StreamedTar:
    """The samples of a tar that is read from its first byte to its last, in one pass.

    Args:
        limit: bytes after which it counts as broken; a compressed file may unpack to any number.

    Attributes:
        problem: where it broke, once its samples have been read; None if it did not.
        notes: as in `TarIndex`, complete once its samples have been read.
    """

    def __init__(self, source: str, name: str = "", limit: int | None = None):
        self.source, self.name, self.limit = source, name, limit
        self.problem: str | None = None
        self.notes: Notes = {}

    def __iter__(self) -> Iterator[TarSample]:
        try:
            with _opened(self.source) as file:
                reader = TarReader(file if self.limit is None else _Limited(file, self.limit))
                yield from iter_samples(reader, self.source, self.name, self.notes)
        except (BrokenTar, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            self.problem = str(error) or type(error).__name__


class _Limited(io.BufferedIOBase):
    """A file that breaks after `limit` bytes."""

    def __init__(self, file: IO[bytes], limit: int):
        self.file, self.limit, self.left = file, limit, limit

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise BrokenTar(f"it unpacks to more than {self.limit:,} bytes: unpack it")
        return data


@contextlib.contextmanager
def _opened(source: str) -> Iterator[Any]:
    """The unpacked bytes of a source; BrokenTar if its command fails."""
    with _raw(source) as raw:
        file = io.BufferedReader(raw) if isinstance(raw, io.RawIOBase) else raw
        kind = compression(file.peek(6))  # type: ignore[attr-defined]
        if kind is None:
            yield file
            return
        with _UNPACK[kind](file, "rb") as unpacked:
            yield unpacked


@contextlib.contextmanager
def _raw(source: str) -> Iterator[IO[bytes] | io.RawIOBase]:
    scheme = _scheme(source)
    if source in STDIN:
        yield sys.stdin.buffer
    elif scheme in URL_SCHEMES:
        with _Download(source) as download:
            yield download
    elif scheme in COMMAND_SCHEMES:
        yield from _command(source)
    else:
        with open(source, "rb") as file:
            yield file


def _command(source: str) -> Iterator[IO[bytes]]:
    """The output of the program that webdataset calls for a source."""
    from webdataset.gopen import gopen  # it imports torch

    try:
        pipe: Any = gopen(source, "rb")
    except (ImportError, ValueError, OSError) as error:
        raise BrokenTar(f"it cannot be opened: {error}") from error
    try:
        yield pipe.stream
        # webdataset's Pipe raises as soon as the program has failed, before its output is read
        rest = pipe.stream.read(1 << 20)
        status = pipe.proc.wait(SILENCE) if len(rest) < 1 << 20 else None
        if status:
            raise BrokenTar(f"its command ended with exit status {status}")
    except subprocess.TimeoutExpired:
        raise BrokenTar("its command did not end") from None
    except BrokenTar as error:
        # a tar that is cut off because the command failed: name the cause as well
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = pipe.proc.wait(1.0)
            if status and "exit status" not in str(error):
                raise BrokenTar(f"{error}; its command ended with exit status {status}") from error
        raise
    finally:
        pipe.stream.close()
        if pipe.proc.poll() is None:
            pipe.proc.kill()
            pipe.proc.wait()


class _Download(io.RawIOBase):
    """The bytes of a URL; a connection that breaks is continued where it stopped, a few times."""

    def __init__(self, url: str):
        self.url, self.position, self.left = url, 0, TRIES
        self._response: http.client.HTTPResponse | None = None
        self._validator: str | None = None  # names this version of the file
        self._end: int | None = None  # its size, if the server says so

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            try:
                response = self._response or self._connect()
                data = response.read(len(buffer))
                if not data and self._end is not None and self.position < self._end:
                    raise OSError(f"the connection ended at byte {self.position} of {self._end}")
            except (OSError, http.client.HTTPException) as error:
                self._try_again(error)
                continue
            buffer[: len(data)] = data
            self.position += len(data)
            return len(data)

    def _connect(self) -> http.client.HTTPResponse:
        request = urllib.request.Request(self.url, headers={"Accept-Encoding": "identity"})
        if self.position:
            request.add_header("Range", f"bytes={self.position}-")
        response = urllib.request.urlopen(request, timeout=SILENCE)
        validator = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if self.position and validator != self._validator:
            raise BrokenTar(f"it changed while it was read (byte {self.position})")
        self._response, self._validator = response, validator
        skipped = 0 if response.status == http.client.PARTIAL_CONTENT else self.position
        length = response.headers.get("Content-Length")
        self._end = self.position - skipped + int(length) if length else None
        while skipped and (data := response.read(min(skipped, 1 << 20))):  # a server without ranges
            skipped -= len(data)
        return response

    def _try_again(self, error: Exception) -> None:
        """Wait for the next try; raises BrokenTar if there is none."""
        self._drop()
        status = error.code if isinstance(error, urllib.error.HTTPError) else None
        self.left -= 1
        if self.left <= 0 or (status is not None and status not in _RETRIED_STATUS):
            reason = f"HTTP {status}" if status else str(getattr(error, "reason", error)) or repr(error)
            raise BrokenTar(f"it cannot be read: {reason}") from error
        time.sleep(PAUSE * 2 ** (TRIES - 1 - self.left))

    def _drop(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None

    def close(self) -> None:
        self._drop()
        super().close()


# ---- writing -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def tar_writer(file: IO[bytes]) -> Iterator[Any]:
    """webdataset's writer without times and owners: the same samples give the same bytes."""
    from webdataset.writer import TarWriter  # it imports torch

    stream: Any = file
    writer = TarWriter(stream, user="", group="", mode=0o644, mtime=0, encoder=False)
    try:
        yield writer
    finally:
        writer.close()


def write_sample(writer: Any, key: str, members: Mapping[str, bytes]) -> None:
    """Add the members (extension -> contents) in their order."""
    for extension, content in members.items():  # of several at a time webdataset sorts the names
        writer.write({"__key__": key, extension: content})
