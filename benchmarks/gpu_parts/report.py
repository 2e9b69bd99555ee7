"""What the parts of benchmarks/gpu.py share: results on disk after every row, deadlines, memory, waits."""

import contextlib
import gc
import importlib.util
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from harness import device_name, measure_seconds, write_results
from torch import nn

NO_TIMING = "dry run: no timing"
GIB = 2**30
_MARGIN = 3.0  # seconds that a part keeps for writing and leaving


class Report:
    """The rows of one part, written to OUT/PART.json after each, so that a killed part leaves what it has.

    Attributes:
        device: "cuda" or "cpu".
        toy: tiny sizes. Their times say nothing, so `measured` leaves them out: a toy number cannot be taken
            for a real one.
        rows: name -> row; a row with "failed" or "skipped" has nothing else that counts.
    """

    def __init__(self, part: str, out: Path, device: str, seconds: float, toy: bool):
        self.device, self.toy = device, toy
        self.path, self.deadline = out / f"{part}.json", time.monotonic() + seconds
        name = "emulated CUDA device" if emulated() else device_name(device)
        self.rows: dict[str, dict[str, Any]] = {
            "device": {"name": name, **({"timing": NO_TIMING} if toy else {})}
        }
        self.write()

    def write(self) -> None:
        """Write all rows."""
        write_results(self.path, self.rows)

    def seconds_left(self) -> float:
        """Seconds until the part is killed, without a margin for writing."""
        return self.deadline - time.monotonic() - _MARGIN

    def measured(self, **numbers: float | None) -> dict[str, float | str | None]:
        """Times, rates and sizes of memory for a row; in a toy run the reason why there are none."""
        return {name: NO_TIMING if self.toy else value for name, value in numbers.items()}

    def row(self, name: str, work: Callable[..., dict[str, Any]], *args: Any, need: float = 0.0) -> bool:
        """Add the row that `work(*args)` returns, and say whether it did.

        A failure is a row as well: the parts list what fails and go on. Memory is freed afterwards.

        Args:
            need: skip the row if fewer seconds are left.
        """
        left = self.seconds_left()
        if left < need and not self.toy:
            self.rows[name] = {"skipped": f"{left:.0f} s left, {need:.0f} s needed"}
        else:
            try:
                self.rows[name] = work(*args)
            except torch.cuda.OutOfMemoryError:
                self.rows[name] = {"failed": "out of memory"}
            except (Exception, SystemExit) as error:  # our commands exit on a user's mistake
                traceback.print_exc()
                self.rows[name] = {"failed": one_line(error)}
        print(name, self.rows[name], flush=True)
        self.write()
        free_memory(self.device)
        return not self.rows[name].keys() & {"failed", "skipped"}

    def seconds(self, work: Callable[[], Any], repeats: int = 3) -> float:
        """Median seconds of a call, after one call to warm up; of one call alone in a toy run."""
        first = measure_seconds(work, self.device)
        times = sorted(measure_seconds(work, self.device) for _ in range(0 if self.toy else repeats))
        return times[len(times) // 2] if times else first


def emulated() -> bool:
    """True on the emulated CUDA device of tests/device, whose numbers are the CPU's."""
    return "EMULATED_CUDA_DEVICES" in os.environ


def one_line(error: BaseException) -> str:
    """Type and first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


def free_memory(device: str) -> None:
    """Return the memory of unreachable tensors to the device; DeepSpeed's engines are cycles."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: str) -> float | None:
    """Largest memory allocated on the device since `free_memory`; None on a CPU."""
    return torch.cuda.max_memory_allocated() / GIB if device == "cuda" else None


@contextlib.contextmanager
def count_waits(device: str) -> Iterator[list[str]]:
    """Collect one text per operation that makes the host wait for the device."""
    found: list[str] = []
    if device != "cuda":
        yield found
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            texts = [(str(w.message), f"{w.filename}:{w.lineno}") for w in caught]
            # the emulated device names kind and place, torch leaves the place to the warning
            found += [text if "(" in text else place for text, place in texts if "synchronizing" in text]


def random_weights(build: Callable[[], nn.Module], device: str, dtype: torch.dtype) -> Any:
    """A module with its own initial weights, built on the device in this dtype.

    Nothing passes through the host: 7 B normal numbers take minutes there.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return build()
    finally:
        torch.set_default_dtype(before)


def load_script(name: str) -> ModuleType:
    """The benchmark script benchmarks/NAME.py as a module; its own name may be that of a package of ours."""
    module_name = f"benchmark_{name}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, Path(__file__).parent.parent / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
