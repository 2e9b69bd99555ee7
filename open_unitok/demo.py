"""The demo: train a tokenizer and an MLLM from scratch, generate, answer, evaluate and write a report.

Every phase is a list of `unitok` commands that can also be run by hand, with the configs in OUT/configs.
Each command skips finished work and resumes interrupted work, so a killed demo is simply run again.
"""

import contextlib
import importlib.resources
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from open_unitok.cli.main import run as run_command
from open_unitok.core.errors import UserError
from open_unitok.core.files import existing, make_folder, write_atomic, write_json
from open_unitok.core.processes import END_WITH_PARENT, FolderLock, available_cores
from open_unitok.core.text_files import read_json
from open_unitok.training.core.config import read_yaml

DEMO_DIR = "runs/demo"
# config -> the phase that uses it
DEMO_CONFIGS = {
    "scenes.yaml": "data",
    "tokenizer.yaml": "tokenizer",
    "pretrain.yaml": "pretrain",
    "finetune.yaml": "finetune",
}
_BENCHMARKS = ("reconstruction", "zeroshot", "retrieval", "vqav2", "pope", "geneval", "positions")
_PROMPTS = (
    "a red circle",
    "a blue square and a yellow triangle",
    "a purple cross at the top left",
    "two green squares",
)
_QUESTION = "How many objects are there?"
# low temperature and moderate guidance suit the small model of the demo
_SAMPLING = ("--guidance", "3.0", "--temperature", "0.3")


def run_demo(out: Path, configs: str | None = None, processes: int | None = None) -> None:
    """Run the phases that are not finished yet, write OUT/report.html and print the table of results.

    Args:
        configs: folder with the files of `DEMO_CONFIGS`; None = the shipped ones.
        processes: that train together, of one thread each; 1 = this process with all threads; None = one per
            core, or 1 with a GPU.

    Raises:
        UserError: a config is invalid or has changed since its phase started, or another demo runs in `out`.
    """
    # validate all configs first: an error in the last phase must not appear after minutes of training
    texts = read_configs(out, configs)
    with FolderLock(make_folder(out), "unitok demo"):
        timings = Timings(out / "phases.json")
        write_configs(out, texts, timings)
        for name, commands in phase_commands(out):
            print(f"\n=== {name}", flush=True)
            if timings.finished(name):
                print("already finished")
                continue
            with timings.phase(name):
                for command in commands:
                    print(f"$ unitok {shlex.join(command)}", flush=True)
                    run_phase_command(command, processes)
        # deferred: `unitok demo --help` must not load torch
        from open_unitok.eval.report.demo import write_report
        from open_unitok.eval.report.demo_run import text_table

        # reads the files of the phases, so that a finished demo can be reported again
        write_report(out, timings.rows)
        print(f"\n{text_table(out)}\n\n{timings.summary()}; the report is {out / 'report.html'}")


def run_phase_command(command: list[str], processes: int | None) -> None:
    """Run one `unitok` command; training runs as `processes` processes of one thread each.

    Threads of one process wait for each other at every operator, and spin while they wait, which makes steps
    beside other work five to ten times slower. Processes wait once in a step.

    Raises:
        UserError: a process failed; it has printed why.
    """
    if command[0] != "train" or (count := training_processes(command[1], processes)) == 1:
        run_command(command)
        return
    with socket.socket() as free:  # a port that nobody uses
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(count):
            own = {**launch, "RANK": rank, "LOCAL_RANK": rank}
            environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
            workers.append(
                subprocess.Popen(
                    [sys.executable, "-m", "open_unitok", *command],
                    env=environment,
                    # the next call needs the run directory
                    preexec_fn=END_WITH_PARENT,
                )
            )
        # one that fails leaves the others waiting for it
        codes = [worker.poll() for worker in workers]
        while None in codes and not any(codes):
            time.sleep(0.1)
            codes = [worker.poll() for worker in workers]
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
    if any(worker.returncode for worker in workers):
        raise UserError(f"`unitok {shlex.join(command)}` failed, see above; `unitok demo` resumes it.")


def training_processes(config: str, wanted: int | None) -> int:
    """How many processes train a config: `wanted` or one per core, as far as its batch divides."""
    if wanted is None:
        import torch  # deferred: `unitok demo --help` must not load it

        wanted = 1 if torch.cuda.is_available() else available_cores()
    batch = read_yaml(config)["batch_size"]
    return max(count for count in range(1, max(wanted, 1) + 1) if batch % count == 0)


def phase_commands(out: Path) -> list[tuple[str, list[list[str]]]]:
    """(phase, the arguments of each of its `unitok` commands), in order."""
    data, configs, model = out / "data", out / "configs", out / "finetune" / "model"
    image = data / "test" / "images" / "scenes_test_000000000001.png"
    tokenizer, shards = out / "tokenizer" / "model", data / "train" / "*.tar"
    # one `eval run` for all benchmarks: the model is loaded once
    benchmarks = ["--model", model, "--data", data, "--out", out / "eval", *_SAMPLING]
    phases: list[tuple[str, list[list[Any]]]] = [
        ("data", [["data", "scenes", "--config", configs / "scenes.yaml", "--out", data]]),
        ("tokenizer", [["train", configs / "tokenizer.yaml"]]),
        ("codes", [["extract-codes", "--tokenizer", tokenizer, "--data", shards, "--out", out / "codes"]]),
        ("pretrain", [["train", configs / "pretrain.yaml"]]),
        ("finetune", [["train", configs / "finetune.yaml"]]),
        (
            "evaluate",
            [
                ["generate", *_PROMPTS, "--model", model, "--out", out / "images", *_SAMPLING],
                ["ask", image, _QUESTION, "--model", model, "--out", out / "answer.jsonl"],
                ["eval", "run", *_BENCHMARKS, *benchmarks],
            ],
        ),
    ]
    return [(name, [[str(word) for word in command] for command in commands]) for name, commands in phases]


def read_configs(out: Path, folder: str | None) -> dict[str, str]:
    """The validated configs, name -> text, with their base folder replaced by `out`.

    The base folder is the parent of tokenizer.yaml's `out`.

    Raises:
        UserError: a config is missing or invalid, `out` is a file or has characters that YAML would escape.
    """
    from open_unitok.training.run import load_run_config
    from open_unitok.training.scenes.dataset import load_config

    if not re.fullmatch(r"[\w./~+@-]+", out.as_posix()):
        raise UserError(
            f"--out is {out}: only letters, digits and ./~+@_- are allowed, since configs contain it."
        )
    # `out` need not exist yet: its nearest existing parent must be a folder
    nearest = next((path for path in (out, *out.parents) if path.exists()), out)
    if nearest.exists() and not nearest.is_dir():
        raise UserError(f"--out is {out}, but {nearest} is a file: choose a folder.")
    source = Path(folder or str(importlib.resources.files("open_unitok.configs").joinpath("demo")))
    texts, base = {}, DEMO_DIR
    for name in DEMO_CONFIGS:
        path = existing(source / name, f"--configs needs {', '.join(DEMO_CONFIGS)}.")
        try:
            config: Any = load_config(path) if name == "scenes.yaml" else load_run_config(str(path), [])
        except UserError as error:
            message = str(error)
            raise UserError(message if str(path) in message else f"{path}: {message}") from error
        if name == "tokenizer.yaml":
            base = Path(config.out).parent.as_posix()
            if base == ".":
                raise UserError(
                    f"{path}: out is {config.out}; it must be inside a folder, e.g. {DEMO_DIR}/tokenizer."
                )
        # parsed for validation only: the text is copied with its comments
        texts[name] = path.read_text(encoding="utf-8")
    return {name: text.replace(base, out.as_posix()) for name, text in texts.items()}


def write_configs(out: Path, texts: dict[str, str], timings: "Timings") -> None:
    """Write OUT/configs.

    Raises:
        UserError: a phase that has already started used another config.
    """
    # check all before writing any
    for name, text in texts.items():
        target = out / "configs" / name
        started = timings.started(DEMO_CONFIGS[name]) and target.exists()
        if started and target.read_text(encoding="utf-8") != text:
            raise UserError(
                f"{target} differs from {name}: choose another --out, or delete {out} to start over."
            )
    for name, text in texts.items():
        write_atomic(out / "configs" / name, text)


class Timings:
    """Seconds and peak memory per phase, saved to a file; the parts of an interrupted phase add up.

    Args:
        interval: seconds between two saves while a phase runs.
    """

    def __init__(self, path: Path, interval: float = 5.0):
        self.path, self.interval = path, interval
        self.rows: list[dict[str, Any]] = read_json(path) if path.exists() else []

    def finished(self, name: str) -> bool:
        """True if an earlier call completed the phase."""
        return any(row["name"] == name and row["finished"] for row in self.rows)

    def started(self, name: str) -> bool:
        """True if an earlier call started the phase."""
        return any(row["name"] == name for row in self.rows)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure one phase."""
        row = next((row for row in self.rows if row["name"] == name), None)
        if row is None:
            # calls > 1 tells the report that the phase was interrupted
            row = {"name": name, "seconds": 0.0, "peak_memory": 0, "calls": 0, "finished": False}
            self.rows.append(row)
        row["calls"] += 1
        _reset_peak_memory()
        # the seconds of earlier, interrupted calls are kept
        start, before, done = time.perf_counter(), row["seconds"], threading.Event()

        def save() -> None:
            row["seconds"] = round(before + time.perf_counter() - start, 2)
            row["peak_memory"] = max(row["peak_memory"], _peak_memory())
            write_json(self.path, self.rows)

        # kill -9 skips `finally`: it loses only the time since the last save
        def save_periodically() -> None:
            while not done.wait(self.interval):
                save()

        save()
        saver = threading.Thread(target=save_periodically, daemon=True)
        saver.start()
        try:
            yield
            row["finished"] = True  # not after an exception
        finally:
            done.set()
            saver.join()
            save()

    def summary(self) -> str:
        """Total minutes, and the phases that were interrupted."""
        minutes = sum(row["seconds"] for row in self.rows) / 60
        resumed = [row["name"] for row in self.rows if row["calls"] > 1]
        interrupted = f" ({', '.join(resumed)} interrupted and resumed)" if resumed else ""
        return f"{minutes:.1f} minutes in total{interrupted}"


def _reset_peak_memory() -> None:
    """Reset the kernel's peak counter (Linux); elsewhere the peak is that of the whole process."""
    # 5 resets VmHWM, see proc(5)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory() -> int:
    """Peak resident bytes of this process, on Linux since the last `_reset_peak_memory`, with the sum of the
    peaks of its running children."""
    if Path("/proc/self/status").exists():
        tasks = Path("/proc/self/task").glob("*/children")
        children = [child for task in tasks for child in _read_process(task).split()]
        return sum(map(_peak_of_process, ("self", *children)))
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, other systems KiB
    return peak if sys.platform == "darwin" else peak * 1024


def _peak_of_process(process: str) -> int:
    lines = _read_process(Path("/proc", process, "status")).split("\n")
    # a process that has ended has none
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def _read_process(path: Path) -> str:
    """The text of a file in /proc; "" if its process or thread has ended."""
    try:
        return path.read_text()
    except OSError:
        return ""
