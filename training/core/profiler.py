"""torch.profiler on a few training steps: a trace and a table in OUT/profile."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from open_unitok.core import distributed

from .options import ProfileOptions, RunConfig

_TABLE_ROWS = 40


class Profiler:
    """Call `step` after each step; rank 0 records `options.steps` of them."""

    def __init__(self, options: ProfileOptions, folder: Path):
        self.options, self.folder = options, folder
        self._running: profile | None = None

    def step(self, step: int) -> None:
        """Start or stop recording after `step` steps."""
        # one rank is enough: all run the same operators
        if not self.options.steps or not distributed.is_main():
            return
        if self._running is not None and step >= self.options.start + self.options.steps:
            self._write(step)
        if self._running is None and step == self.options.start:
            cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._running = profile(activities=[ProfilerActivity.CPU, *cuda])
            self._running.start()

    def _write(self, step: int) -> None:
        assert self._running is not None
        recording, self._running = self._running, None
        recording.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"steps-{self.options.start + 1}-{step}"
        recording.export_chrome_trace(str(self.folder / f"{name}.json.gz"))
        # the most expensive operators first
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table: Any = recording.key_averages().table(sort_by=order, row_limit=_TABLE_ROWS)
        (self.folder / f"{name}.txt").write_text(table, encoding="utf-8")

    def close(self) -> None:
        """Discard a recording that is not complete."""
        if self._running is not None:
            self._running.stop()
            self._running = None


@contextlib.contextmanager
def profile_steps(config: RunConfig, out: Path, step: int) -> Iterator[Profiler]:
    """A profiler for a loop that starts after `step` steps; it writes into OUT/profile."""
    profiler = Profiler(config.profile, out / "profile")
    profiler.step(step)
    try:
        yield profiler
    finally:
        profiler.close()
