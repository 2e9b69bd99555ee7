"""SIGTERM, Ctrl-C and the checkpoint clock, agreed upon by all ranks without a collective in every step."""

import signal
import sys
import threading
import time
from typing import Any

import torch
import torch.distributed as dist

from open_unitok.core import distributed

# Several ranks ask each other about this often. A reduction on CPUs takes 2 (ranks - 1) hops, about 15 ms on
# 256 ranks, which would be 3 % of a step of half a second.
ASK_SECONDS = 1.0
MOST_STEPS = 1000  # without asking, however short a step is


class StopOnSignal:
    """Turns SIGTERM and Ctrl-C into a flag that the training loop polls between steps.

    Within `with StopOnSignal() as stop:`, `stop()` is True once a signal has arrived on any rank: call it on
    every rank after every step. One rank answers at once, several about `ASK_SECONDS` later, all at the same
    step. A second signal ends the process at once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None  # that this rank has received
        self.agreed: int | None = None  # that all ranks act upon
        self._previous: dict[int, Any] = {}
        # steps since the ranks asked each other, and after how many they ask again
        self._steps, self._ask_after = 0, 1
        self._asked = time.monotonic()

    def __enter__(self) -> "StopOnSignal":
        # signals can be caught in the main thread only
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        self._asked = time.monotonic()
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: Any) -> None:
        # second signal: the default action ends the process
        if self.signal is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = number

    def __call__(self, late: bool = False) -> bool:
        """Whether to save a checkpoint now: a signal has arrived, or rank 0 is `late` with one."""
        if distributed.world_size() == 1:
            self.agreed = self.signal
            return late or self.agreed is not None
        self._steps += 1
        if self._steps < self._ask_after:
            return False
        # the clocks of the ranks differ: rank 0's decides when a checkpoint is late
        mine = (self.signal or 0, int(late and distributed.is_main()), -self._wanted_steps())
        answers = torch.tensor(mine)
        # the largest number decides for all: ranks receive a signal at different times
        dist.all_reduce(answers, op=dist.ReduceOp.MAX)
        received, late_somewhere, steps = answers.tolist()
        self._steps, self._ask_after = 0, -steps
        self.agreed = received or None
        return bool(received or late_somewhere)

    def _wanted_steps(self) -> int:
        """Steps until this rank wants to ask again: about `ASK_SECONDS`, at most twice as many as before."""
        now = time.monotonic()
        seconds = max(now - self._asked, 1e-6) / self._steps
        self._asked = now
        return max(1, min(int(ASK_SECONDS / seconds), 2 * self._ask_after, MOST_STEPS))

    def exit_if_signalled(self) -> None:
        """Exit with the code of the signal that `stop()` reported; call it after saving."""
        # not `signal`: a rank that left alone would make the others hang
        if self.agreed is None:
            return
        if self.agreed == signal.SIGINT:
            raise KeyboardInterrupt
        if distributed.is_main():
            print("unitok: stopped by SIGTERM; run the same command again to resume.", file=sys.stderr)
        sys.exit(128 + self.agreed)  # the exit code that a shell reports for a signal
