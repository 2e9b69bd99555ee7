"""Shared by the benchmarks: device names, timing, isolated processes, result files."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from open_unitok.core.devices import processor_name

RESULTS = Path(__file__).parent / "results"


def device_name(device: str | torch.device) -> str:
    """The GPU's name, or the processor's."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


def result_file(benchmark: str, device: str, folder: Path = RESULTS) -> Path:
    """FOLDER/BENCHMARK-DEVICE.json."""
    return folder / f"{benchmark}-{re.sub(r'[^A-Za-z0-9]+', '-', device).strip('-')}.json"


def measure_seconds(work: Callable[[], Any], device: str = "cpu") -> float:
    """Wall-clock seconds of one call, GPU work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def best_seconds(work: Callable[[], Any], repeats: int = 3, device: str = "cpu") -> float:
    """Seconds of the fastest call: other load on the machine can only add time."""
    return min(measure_seconds(work, device) for _ in range(repeats))


def run_isolated(script: str, *arguments: str) -> Any:
    """JSON from the last line of a script run in its own process, so that peak memory is its own."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def reset_peak_memory() -> None:
    """Reset the process's peak resident memory (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gib() -> float | None:
    """Peak resident memory since `reset_peak_memory`; None where /proc is missing."""
    try:
        line = next(x for x in Path("/proc/self/status").read_text().split("\n") if x.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) / 2**20


def load_average() -> float:
    """Load average of the last minute; above the number of cores, results are unreliable."""
    return round(os.getloadavg()[0], 1)


def read_results(path: Path) -> dict[str, Any]:
    """The results in a file; {} if it does not exist."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """One line per entry, so that a new measurement is a small diff. A kill leaves a whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in results.items())
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_text(f"{{\n{lines}\n}}\n")
    temporary.replace(path)
