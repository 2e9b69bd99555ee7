"""From nothing to a model that generates and answers, by calling the other commands in order.

It only calls: every phase is a command that can be run by hand, with the configs it leaves in OUT/configs.
Each of them skips what is finished and goes on where it was stopped: a killed demo is simply run again.
"""

import contextlib
import importlib.resources
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing, read_json, write_atomic, write_json

HOME = "runs/demo"
# config -> the phase that uses it
CONFIGS = {
    "scenes.yaml": "data",
    "tokenizer.yaml": "tokenizer",
    "pretrain.yaml": "pretrain",
    "finetune.yaml": "finetune",
}
BENCHMARKS = ("reconstruction", "zeroshot", "retrieval", "vqav2", "pope", "geneval", "drawing_positions")
PROMPTS = (
    "a red circle",
    "a blue square and a yellow triangle",
    "a purple cross at the top left",
    "two green squares",
)
QUESTION = "How many objects are there?"
DRAWING = ("--guidance", "3.0", "--temperature", "0.3")


def phases(out: Path) -> list[tuple[str, list[list[str]]]]:
    """Phase -> the commands it consists of."""
    data, configs, model = out / "data", out / "configs", out / "finetune" / "model"
    image = data / "test" / "images" / "scenes_test_000000000001.png"

    def words(*command: Any) -> list[str]:
        return [str(word) for word in command]

    return [
        ("data", [words("data", "scenes", "--config", configs / "scenes.yaml", "--out", data)]),
        ("tokenizer", [words("train", configs / "tokenizer.yaml")]),
        (
            "codes",
            [
                words(
                    "extract-codes",
                    "--tokenizer",
                    out / "tokenizer" / "model",
                    "--data",
                    data / "train" / "*.tar",
                    "--out",
                    out / "codes",
                )
            ],
        ),
        ("pretrain", [words("train", configs / "pretrain.yaml")]),
        ("finetune", [words("train", configs / "finetune.yaml")]),
        (
            "evaluate",
            [
                words("generate", *PROMPTS, "--model", model, "--out", out / "drawings", *DRAWING),
                words("ask", image, QUESTION, "--model", model, "--out", out / "answer.jsonl"),
                words(
                    "eval",
                    "run",
                    *BENCHMARKS,
                    "--model",
                    model,
                    "--data",
                    data,
                    "--out",
                    out / "eval",
                    *DRAWING,
                ),
            ],
        ),
    ]


def read_configs(out: Path, folder: str | None) -> dict[str, str]:
    """Name -> text of the configs of this run, all checked, with OUT in place of the home that they name.

    Their home is the folder in which stage 1's `out` lies.

    Raises:
        UserError: a config is missing or wrong, OUT cannot stand in a YAML, or OUT is a file.
    """
    from open_unitok.training.run import load
    from open_unitok.training.scenes.dataset import load_config

    if not re.fullmatch(r"[\w./~+@-]+", out.as_posix()):
        raise UserError(
            f"--out is {out}: letters, digits and ./~+@_- are allowed, as it is written into configs."
        )
    above = next((path for path in (out, *out.parents) if path.exists()), out)
    if above.exists() and not above.is_dir():
        raise UserError(f"--out is {out}, but {above} is a file: name a folder.")
    source = Path(folder or str(importlib.resources.files("open_unitok.configs").joinpath("demo")))
    texts, home = {}, HOME
    for name in CONFIGS:
        path = existing(source / name, f"--configs needs {', '.join(CONFIGS)}.")
        try:
            config: Any = load_config(path) if name == "scenes.yaml" else load(str(path), [])
        except UserError as error:
            message = str(error)
            raise UserError(message if str(path) in message else f"{path}: {message}") from error
        if name == "tokenizer.yaml":
            home = Path(config.out).parent.as_posix()
            if home == ".":
                raise UserError(
                    f"{path}: out is {config.out}; it must lie in a folder of the run, as {HOME}/tokenizer."
                )
        texts[name] = path.read_text(encoding="utf-8")
    return {name: text.replace(home, out.as_posix()) for name, text in texts.items()}


def write_configs(out: Path, texts: dict[str, str], timings: "Timings") -> None:
    """Lay the configs into OUT/configs.

    Raises:
        UserError: a phase was begun with another config.
    """
    for name, text in texts.items():
        target = out / "configs" / name
        begun = timings.begun(CONFIGS[name]) and target.exists()
        if begun and target.read_text(encoding="utf-8") != text:
            raise UserError(
                f"{target} differs from {name}: take another --out, or delete {out} to begin anew."
            )
    for name, text in texts.items():
        write_atomic(out / "configs" / name, text)


@contextlib.contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Hold OUT for this process; the lock goes with the process, however it ends.

    Raises:
        UserError: another demo is at work in OUT.
    """
    import fcntl

    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Another unitok demo is at work in {out}: wait for it, or take another --out."
            ) from None
        yield


class Timings:
    """Seconds and peak memory per phase, kept in a file; a phase that was stopped adds up its parts."""

    def __init__(self, path: Path, every: float = 5.0):
        self.path, self.every = path, every  # seconds between two notes of a phase at work
        self.rows: list[dict[str, Any]] = read_json(path) if path.exists() else []

    def finished(self, name: str) -> bool:
        """True for a phase that an earlier call brought to its end."""
        return any(row["name"] == name and row["finished"] for row in self.rows)

    def begun(self, name: str) -> bool:
        """True for a phase that an earlier call began."""
        return any(row["name"] == name for row in self.rows)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure one phase."""
        row = next((row for row in self.rows if row["name"] == name), None)
        if row is None:
            row = {"name": name, "seconds": 0.0, "peak_memory": 0, "calls": 0, "finished": False}
            self.rows.append(row)
        row["calls"] += 1
        forget_peak_memory()
        start, before, over = time.perf_counter(), row["seconds"], threading.Event()

        def note() -> None:
            row["seconds"] = round(before + time.perf_counter() - start, 2)
            row["peak_memory"] = max(row["peak_memory"], peak_memory())
            write_json(self.path, self.rows)

        def keep_noting() -> None:  # a kill -9 loses the seconds since the last note; "calls" tells of it
            while not over.wait(self.every):
                note()

        note()
        clock = threading.Thread(target=keep_noting, daemon=True)
        clock.start()
        try:
            yield
            row["finished"] = True
        finally:
            over.set()
            clock.join()
            note()


def forget_peak_memory() -> None:
    """Begin a new peak where the system can (Linux); elsewhere the peak is that of the process so far."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Bytes that this process has held at most, since the last `forget_peak_memory` on Linux."""
    status = Path("/proc/self/status")
    if status.exists():
        peak = next(line for line in status.read_text().split("\n") if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
