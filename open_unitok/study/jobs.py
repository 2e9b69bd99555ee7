"""The jobs of a study: its rows with each seed, their order, and whether they are finished."""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from open_unitok.core.devices import processor_name
from open_unitok.core.errors import UserError, did_you_mean
from open_unitok.core.text_files import read_json
from open_unitok.training.run import load_run_config

from .columns import known_columns
from .commands import row_commands, row_config, run_folder
from .config import Study, parse_difference, read_study

UNRELATED = ("resume_from", "stop_at", "checkpoint", "log", "profile")  # keys that change no result


class RowRun(NamedTuple):
    """One row with one seed."""

    row: str
    seed: int
    commands: list[list[str]]  # arguments of `unitok`
    run_dir: Path
    result: Path
    needs: str | None  # the name of the job that trains what it starts from
    minutes: float

    @property
    def name(self) -> str:
        return self.run_dir.name


def load_study(path: str) -> Study:
    """The validated YAML of a study; every row's configs are read as well.

    Raises:
        UserError: an unknown key, a wrong value, or a config that is missing or invalid.
    """
    study = read_study(path)
    for name in study.rows:
        try:
            for command in row_commands(study, name, study.seeds[0]):
                if command[0] == "train":
                    load_run_config(command[1], command[2:])
        except UserError as error:
            raise UserError(f"{path}: row {name}: {error}") from error
    columns = known_columns(study)
    for difference in (d for claim in study.claims for d in claim.differences):
        for _, _, key in parse_difference(difference):
            if key not in columns:
                hint = did_you_mean(key, columns)
                raise UserError(f"{path}: claims: {difference!r}: there is no column {key!r}.{hint}")
    return study


def study_jobs(study: Study, seeds: list[int] | None = None, only: list[str] | None = None) -> list[RowRun]:
    """The jobs of a study, those that others start from first.

    Raises:
        UserError: `only` names a row that the study does not have.
    """
    for name in only or ():
        if name not in study.rows:
            raise UserError(f"--only {name}: the study has no such row.{did_you_mean(name, study.rows)}")
    jobs = []
    for seed in study.seeds if seeds is None else seeds:
        for name, row in study.rows.items():
            if only and name not in only:
                continue
            needs = f"{row.after}-{seed}" if row.after else None
            commands = row_commands(study, name, seed)
            result = Path(study.results, name, f"{seed}.json")
            run_dir = run_folder(study, name, seed)
            jobs.append(RowRun(name, seed, commands, run_dir, result, needs, row.minutes))
    return sorted(jobs, key=lambda job: job.needs is not None)  # stable


def settings_digest(study: Study, job: RowRun) -> str:
    """A hash of everything that a job's YAMLs and commands say but paths: other settings are another row.

    Defaults are left out, so that a new key of a config does not make finished rows others.
    """
    settings: list[Any] = []
    for command in job.commands:
        if command[0] != "train":
            settings.append(command)
            continue
        config = row_config(command[1], *command[2:])
        kept = {key: value for key, value in config.items() if key not in UNRELATED}
        engine = {key: value for key, value in (kept.get("engine") or {}).items() if key != "threads"}
        settings.append({**kept, "engine": engine})  # threads are of the machine
    text = json.dumps(settings, sort_keys=True)
    for folder, name in ((study.out, "OUT"), (study.data, "DATA")):
        text = text.replace(f"{folder}/", f"{name}/")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_finished(study: Study, job: RowRun) -> bool:
    """Whether the job's result exists.

    Raises:
        UserError: it is of other settings.
    """
    if not job.result.exists():
        return False
    found = read_json(job.result)
    for key, wanted in (("limit", study.limit), ("settings", settings_digest(study, job))):
        if not isinstance(found, dict) or found.get(key) != wanted:
            raise UserError(f"{job.result} was measured with other settings ({key}): remove it and repeat.")
    return True


def describe_job(study: Study, job: RowRun) -> dict[str, Any]:
    """What is known about a result before it is measured."""
    machine = f"{processor_name()}, {os.cpu_count()} cores"
    known = {"row": job.row, "seed": job.seed, "title": study.rows[job.row].title}
    known |= {"settings": settings_digest(study, job), "limit": study.limit}
    return {**known, "processor": machine, "date": time.strftime("%Y-%m-%d")}
