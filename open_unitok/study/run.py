"""Trains and measures the rows of a study, several at a time; finished ones are skipped, others resume."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from open_unitok.core import distributed
from open_unitok.core.devices import processor_name
from open_unitok.core.errors import UserError
from open_unitok.core.files import existing, make_folder
from open_unitok.core.processes import FolderLock
from open_unitok.core.text_files import read_json
from open_unitok.training.core.config import read_yaml

from .config import PART_MINUTES, RowRun, Study, settings_digest


def run_jobs(study: Study, jobs: Sequence[RowRun], workers: int) -> list[str]:
    """Run the unfinished jobs, `workers` at a time; returns a line for each one that failed.

    Under torchrun each process takes its share, on its own GPU.

    Raises:
        UserError: the data is missing, another study runs in the folder, or a row needs one that has not run.
    """
    existing(Path(study.data, "emoji.json"), f"`unitok data emoji --out {study.data}` writes the data.")
    todo = [job for job in jobs if not is_finished(study, job)]
    for job in todo:
        if job.needs and not (job.needs / "model").exists() and job.needs not in {j.run_dir for j in todo}:
            raise UserError(f"Row {job.row} starts from {job.needs}/model, which does not exist.")
    rank, ranks = distributed.rank(), distributed.world_size()
    folder = make_folder(Path(study.out, ".study", str(rank)))
    with FolderLock(folder, "unitok study"), ThreadPoolExecutor(workers) as pool:
        running: dict[Path, Future[str]] = {}
        for job in todo[rank::ranks]:
            waits_for = running.get(job.needs) if job.needs else None
            running[job.run_dir] = pool.submit(_run_job, study, job, waits_for)
        return [line for future in running.values() if (line := future.result())]


def is_finished(study: Study, job: RowRun) -> bool:
    """Whether the job's result exists.

    Raises:
        UserError: it is of other settings.
    """
    if not job.result.exists():
        return False
    found, wanted = read_json(job.result), _known(study, job)
    for key in ("settings", "limit"):
        if found.get(key) != wanted[key]:
            raise UserError(f"{job.result} was measured with other settings ({key}): remove it and repeat.")
    return True


def _known(study: Study, job: RowRun) -> dict[str, Any]:
    """What is known about a result before it is measured."""
    title = study.rows[job.row].title
    machine = f"{processor_name()}, {os.cpu_count()} cores"
    known = {"row": job.row, "seed": job.seed, "title": title, "settings": settings_digest(job)}
    return {**known, "limit": study.limit, "processor": machine, "date": time.strftime("%Y-%m-%d")}


def _run_job(study: Study, job: RowRun, waits_for: "Future[str] | None") -> str:
    """Train and measure one row; returns "" or why it failed."""
    if waits_for is not None and waits_for.result():
        return f"{job.name}: the row that it starts from failed"
    log = make_folder(Path(study.out, "logs")) / f"{job.name}.log"
    start = time.monotonic()
    print(f"{job.name}: training, {job.minutes:.0f} minutes planned (log: {log})", flush=True)
    # one thread per row: rows run side by side
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    if distributed.world_size() > 1:
        environment["CUDA_VISIBLE_DEVICES"] = str(distributed.local_rank())
    with open(log, "a", encoding="utf-8") as file:
        for command in job_commands(study, job):
            file.write(f"$ {' '.join(command)}\n")
            file.flush()
            done = subprocess.run(
                [sys.executable, "-m", *command], stdout=file, stderr=subprocess.STDOUT, env=environment
            )
            if done.returncode:
                return f"{job.name}: `{' '.join(command[:3])}` failed with {done.returncode}, see {log}"
    print(f"{job.name}: finished after {(time.monotonic() - start) / 60:.1f} minutes", flush=True)
    return ""


def job_commands(study: Study, job: RowRun) -> list[list[str]]:
    """The arguments of `python -m` for each step of a job; every step skips what is finished."""
    model, data = job.run_dir / "model", Path(study.data)
    config = read_yaml(job.config, job.overrides)
    discrete = config["model"].get("quantizer") != "none"
    reads_captions = config["losses"].get("clip", 1.0) > 0 and config["model"].get("embed_dim", 1) > 0
    pooling = ["--pooling", "quantised" if discrete else "latents"]
    limit = ["--limit", str(study.limit)] if study.limit else []
    commands = [["open_unitok", "train", job.config, *job.overrides]]
    for split in study.splits:
        benchmarks = ["reconstruction", "emoji_reconstruction", *(["retrieval"] if reads_captions else [])]
        zeroshot = ["zeroshot"] if reads_captions else []
        labels = (("category", ["linear_probe", *zeroshot]), ("style", ["linear_probe"]))
        out = job.run_dir / "eval" / split
        run = ["--model", str(model), *limit]
        commands.append(
            ["open_unitok", "eval", "run", *benchmarks, *run, "--data", str(data / split), "--out", str(out)]
        )
        for label, names in labels:
            where = ["--data", str(data / split / f"{label}.json"), "--out", str(out / label)]
            commands.append(["open_unitok", "eval", "run", *names, *run, *where, *pooling])
    measured = {"known": _known(study, job), "run_dir": str(job.run_dir), "result": str(job.result)}
    commands.append(["open_unitok.study.measure", json.dumps({**measured, "splits": study.splits})])
    return commands


def plan_parts(jobs: Sequence[RowRun], workers: int) -> list[list[RowRun]]:
    """Jobs in their order, cut into parts of at most `PART_MINUTES` on `workers` cores."""
    parts: list[list[RowRun]] = []
    loads: list[float] = []
    for job in jobs:
        shortest = min(loads, default=0.0)
        if not parts or shortest + job.minutes > PART_MINUTES:
            parts.append([])
            loads = [0.0] * workers
        loads[loads.index(min(loads))] += job.minutes
        parts[-1].append(job)
    return parts


def part_minutes(jobs: Sequence[RowRun], workers: int) -> float:
    """Minutes of a part, its jobs started in order, each on the first free core."""
    loads = [0.0] * workers
    for job in jobs:
        loads[loads.index(min(loads))] += job.minutes
    return max(loads)
