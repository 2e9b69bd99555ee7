"""Exclusive use of a folder, and worker processes that end with the process that started them."""

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from .errors import UserError

try:
    import fcntl
except ImportError:
    fcntl = None

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def available_cores() -> int:
    """Cores that this process may use: in a container, fewer than the machine has."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return len(affinity(0)) if affinity else os.cpu_count() or 1


class FolderLock:
    """Exclusive use of an existing folder, until `close` or the end of the process, even by kill -9.

    Args:
        what: the kind of run, for the message.

    Raises:
        UserError: another process uses the folder.
    """

    def __init__(self, folder: Path, what: str):
        self._file: TextIO | None = None
        if fcntl is None:  # Windows has no flock: there the folder is not locked
            return
        file = open(folder / ".lock", "a", encoding="utf-8")  # noqa: SIM115
        try:
            # flock, not a pid file: the kernel releases it when the process ends
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(
                f"Another {what} runs in {folder}: wait for it, or choose another folder (--out, out=)."
            ) from None
        self._file = file

    def close(self) -> None:
        """Release the folder."""
        if self._file is not None and fcntl is not None:
            # closing alone is not enough: worker processes have inherited the file
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()
            self._file = None

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def die_with_parent(*_: Any) -> None:
    """End this process when its parent ends, also by kill -9; call it first in a worker process.

    Takes and ignores arguments, so that it can be a `worker_init_fn` or an initialiser of a pool.
    """
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    # the parent may have ended before the call
    if os.getppid() != parent:
        os._exit(1)


# `preexec_fn` of a subprocess that must not outlive this process (on Linux: the thread that starts it)
END_WITH_PARENT = die_with_parent if sys.platform == "linux" else None


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
