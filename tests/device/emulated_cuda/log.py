"""What the emulated device counts: operators, host synchronisations by source line, SDPA kernels."""

import collections
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = str(Path(__file__).resolve().parent)
ROOT = str(Path(__file__).resolve().parents[3])


class Log:
    """Counters of everything since the last `clear`.

    Attributes:
        syncs: (kind, place) -> how often the host waited for the device there.
        attention: (kernel that CUDA would take, place) -> calls.
        refused: what a capture refused, as (kind, place).
        operators: operators that ran on the device.
        replays: of captured graphs.
        compiled: calls of torch.compile, which compiles nothing here.
    """

    def __init__(self):
        self.syncs: collections.Counter[tuple[str, str]] = collections.Counter()
        self.attention: collections.Counter[tuple[str, str]] = collections.Counter()
        self.refused: list[tuple[str, str]] = []
        self.operators = self.replays = self.compiled = 0

    def clear(self) -> None:
        self.__init__()

    @property
    def waits(self) -> int:
        """Host synchronisations of any kind."""
        return sum(self.syncs.values())

    def report(self) -> dict:
        """As JSON."""
        return {
            "waits": self.waits,
            "syncs": {f"{kind} at {place}": n for (kind, place), n in self.syncs.most_common()},
            "attention": {f"{kernel} at {place}": n for (kernel, place), n in self.attention.most_common()},
            "refused": [f"{kind} at {place}" for kind, place in self.refused],
            "operators": self.operators,
            "replays": self.replays,
        }


LOG = Log()


def place() -> str:
    """The innermost source line of this repository that is at work, outside the emulation."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and not name.startswith(HERE) and "site-packages" not in name:
            return f"{name[len(ROOT) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def measure(work: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, dict]:
    """The result of a call, and what was counted in it."""
    LOG.clear()
    found = work(*args, **kwargs)
    return found, LOG.report()
