"""Trains and measures the rows of a study, several at a time; finished ones are skipped, others resume."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from open_unitok.core import distributed
from open_unitok.core.errors import UserError
from open_unitok.core.files import make_folder
from open_unitok.core.processes import END_WITH_PARENT, FolderLock

from .config import Study
from .jobs import RowRun, describe_job, is_finished
from .requirements import missing_data, missing_for

PART_MINUTES = 120  # a plan is cut into parts of at most two hours
PlannedRow = tuple[Study, RowRun]  # a job and the study that it is of


def run_jobs(tasks: Sequence[PlannedRow], workers: int) -> list[str]:
    """Run the unfinished jobs, `workers` at a time; returns a line for each one that has no result.

    Under torchrun each process takes its share, on its own GPU.

    Raises:
        UserError: data is missing, or another study runs in the folder.
    """
    todo = [(study, job) for study, job in tasks if not is_finished(study, job)]
    for study in {study.data: study for study, _ in todo}.values():
        if reason := missing_data(study):
            raise UserError(reason)
    reasons = {job.run_dir: missing_for(job) for _, job in todo}
    lines = [f"{job.name}: not run: {reasons[job.run_dir]}" for _, job in todo if reasons[job.run_dir]]
    todo = _share([(study, job) for study, job in todo if not reasons[job.run_dir]])
    running: dict[Path, Future[str]] = {}
    with contextlib.ExitStack() as locks, ThreadPoolExecutor(workers) as pool:
        for out in dict.fromkeys(study.out for study, _ in todo):
            folder = make_folder(Path(out, ".study", str(distributed.rank())))
            locks.enter_context(FolderLock(folder, "unitok study"))
        for study, job in todo:
            waits_for = running.get(job.run_dir.parent / job.needs) if job.needs else None
            running[job.run_dir] = pool.submit(_run_job, study, job, waits_for)
        return lines + [line for future in running.values() if (line := future.result())]


def _share(tasks: Sequence[PlannedRow]) -> list[PlannedRow]:
    """The jobs of this process: those that start from each other stay together."""
    roots = [job.run_dir.parent / (job.needs or job.name) for _, job in tasks]
    numbers = {root: number for number, root in enumerate(dict.fromkeys(roots))}
    rank, ranks = distributed.rank(), distributed.world_size()
    return [task for task, root in zip(tasks, roots) if numbers[root] % ranks == rank]


def _run_job(study: Study, job: RowRun, waits_for: "Future[str] | None") -> str:
    """Train and measure one row; returns "" or why it failed."""
    if waits_for is not None and waits_for.result():
        return f"{job.name}: the row that it starts from failed"
    log = make_folder(Path(study.out, "logs")) / f"{job.name}.log"
    start = time.monotonic()
    print(f"{job.name}: started, {job.minutes:.0f} minutes planned (log: {log})", flush=True)
    # one thread per row: rows run side by side
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    if distributed.world_size() > 1:
        environment["CUDA_VISIBLE_DEVICES"] = str(distributed.local_rank())
    with open(log, "a", encoding="utf-8") as file:
        for command in [_on_device(c) for c in job.commands] + [measure_command(study, job)]:
            file.write(f"$ {' '.join(command)}\n")
            file.flush()
            done = subprocess.run(
                [sys.executable, "-m", *command],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                # a killed study leaves no training behind, which would lock the row
                preexec_fn=END_WITH_PARENT,
            )
            if done.returncode:
                return f"{job.name}: `{' '.join(command[:3])}` failed with {done.returncode}, see {log}"
    print(f"{job.name}: finished after {(time.monotonic() - start) / 60:.1f} minutes", flush=True)
    return ""


def _on_device(command: list[str]) -> list[str]:
    """A command for `python -m`; training and extract-codes take a GPU by themselves, evaluation is told."""
    evaluates = command[:2] == ["eval", "run"] and torch.cuda.is_available()
    return ["open_unitok", *command, *(["--device", "cuda"] if evaluates else [])]


def measure_command(study: Study, job: RowRun) -> list[str]:
    """The last command of a job, which writes its result."""
    about = {"known": describe_job(study, job), "run_dir": str(job.run_dir), "result": str(job.result)}
    if study.downstream:
        row = study.rows[job.row]
        owner = str(job.run_dir.parent / job.needs) if job.needs else None
        about |= {"guidance": study.downstream.guidance, "parts": row.parts, "tokenizer_of": owner}
        return ["open_unitok.study.measure_downstream", json.dumps(about)]
    return ["open_unitok.study.measure", json.dumps(about | {"splits": study.splits})]


def plan_parts(tasks: Sequence[PlannedRow], workers: int) -> list[list[PlannedRow]]:
    """Jobs in their order, cut into parts of at most `PART_MINUTES` on `workers` cores."""
    parts: list[list[PlannedRow]] = []
    loads: list[float] = []
    for task in tasks:
        if not parts or min(loads) + task[1].minutes > PART_MINUTES:
            parts.append([])
            loads = [0.0] * workers
        loads[loads.index(min(loads))] += task[1].minutes
        parts[-1].append(task)
    return parts


def part_minutes(tasks: Sequence[PlannedRow], workers: int) -> float:
    """Minutes of a part, its jobs started in order, each on the first free core."""
    loads = [0.0] * workers
    for _, job in tasks:
        loads[loads.index(min(loads))] += job.minutes
    return max(loads)
