"""Compile native.cpp once per machine and open it from the user's cache folder.

A library is code that runs in this process. It is opened only if the folder is the user's own and its content
has the hash that is part of its file name; everything else is compiled anew. Files are written, synced and
renamed, so that another process never opens half of one.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

_SOURCE = Path(__file__).with_name("native.cpp")
_SOURCES = (_SOURCE, _SOURCE.with_name("matmul.h"))
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread")
_TIMEOUT = 300  # seconds, of the compiler
_STALE = 3600  # seconds after which a temporary folder is left over from a killed process
_log = logging.getLogger(__name__)


def open_library() -> ctypes.CDLL | None:
    """The compiled library, from the cache where that can be trusted; None, with a logged reason, without."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
    folder = _cache_folder()
    try:
        if folder is not None and (cached := _cached(folder)):
            return ctypes.CDLL(str(cached))
        if compiler is None:
            _log.info("No C++ compiler found: torch's operators are used, which is several times slower.")
            return None
        if folder is not None:
            try:
                return ctypes.CDLL(str(_install(folder, compiler)))
            except OSError as error:  # read-only or full
                _log.warning("%s cannot hold the compiled C++ backend: %s", folder, error)
        # a folder for this process alone: a loaded library outlives its file
        with tempfile.TemporaryDirectory(prefix="open-unitok-") as work:
            return ctypes.CDLL(str(_compile(Path(work), compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        # never fatal; the end of a compiler's output has the actual error
        detail = getattr(error, "stderr", None) or str(error)
        _log.warning("The C++ backend could not be built; torch's operators are used: %s", detail[-300:])
        return None


def _flags() -> tuple[str, ...]:
    """The compiler's flags; `UNITOK_NATIVE_MARCH` names other instructions than this processor's."""
    return (f"-march={os.environ.get('UNITOK_NATIVE_MARCH') or 'native'}", *_FLAGS)


def _key() -> str:
    """Hash of the sources, the compiler's flags and the processor."""
    text = b"".join(path.read_bytes() for path in _SOURCES) + " ".join(_flags()).encode()
    return hashlib.sha256(text + _processor().encode()).hexdigest()[:16]


def _processor() -> str:
    """A string that changes with `-march=native`: different machines may share a home folder."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.system()} {platform.machine()} {platform.processor()} {flags}"


def _cache_folder() -> Path | None:
    """$XDG_CACHE_HOME/open-unitok or ~/.cache/open-unitok; None if others may write to it."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # relative paths are invalid in the XDG specification
        folder = (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "open-unitok"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = folder.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: no home
        _log.warning("No cache folder for the compiled C++ backend: %s", error)
        return None
    for place in (folder, *folder.parents):
        if reason := _writable_by_others(place):
            _log.warning("%s is not used for the compiled C++ backend: %s %s.", folder, place, reason)
            return None
    return folder


def _writable_by_others(path: Path) -> str | None:
    """Why someone else could replace what lies at `path`; None if only this user and root can."""
    if not hasattr(os, "getuid"):  # Windows: a profile is its user's own
        return None
    found = path.stat()
    if found.st_uid not in (0, os.getuid()):
        return f"belongs to user {found.st_uid}"
    # a user's private group, which many systems give write access by default, has only that user
    private = found.st_gid == found.st_uid == os.getuid()
    # a sticky folder, like /tmp, lets others add entries but not replace ours
    sticky = path.is_dir() and found.st_mode & 0o1000
    if found.st_mode & (0o002 if private else 0o022) and not sticky:
        return "may be written by others"
    return None


def _cached(folder: Path) -> Path | None:
    """A library of this key that is whole; broken ones are removed."""
    for path in sorted(folder.glob(f"native-{_key()}-*.so")):
        own = path.is_file() and not path.is_symlink() and not _writable_by_others(path)
        if own and path.stem.rpartition("-")[2] == _content_hash(path):
            return path
        path.unlink()
    return None


def _content_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _install(folder: Path, compiler: str) -> Path:
    """Compile into the cache folder; several processes may do so at the same time."""
    for left in folder.glob("tmp*"):
        if time.time() - left.stat().st_mtime > _STALE:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        built = _compile(Path(work), compiler)
        path = folder / f"native-{_key()}-{_content_hash(built)}.so"
        with open(built, "rb+") as file:
            os.fsync(file.fileno())
        built.chmod(0o700)
        built.replace(path)
    return path


def _compile(folder: Path, compiler: str) -> Path:
    built = folder / "native.so"
    command = [compiler, *_flags(), "-o", str(built), str(_SOURCE)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT)
    if not built.exists() or not built.stat().st_size:
        raise subprocess.SubprocessError(f"{compiler} wrote no library")
    return built
