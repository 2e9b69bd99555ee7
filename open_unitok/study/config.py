"""The YAML of a study: its rows and seeds, where they are trained, and where finished rows are kept."""

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from open_unitok.core.errors import UserError, did_you_mean
from open_unitok.training.core.config import build_config, read_yaml, to_dict
from open_unitok.training.run import load_run_config

PART_MINUTES = 120  # a plan is cut into parts of at most two hours
_NAME = re.compile(r"[a-z0-9][a-z0-9_]*")


@dataclass(frozen=True)
class Row:
    """A row of a study.

    Attributes:
        config: training config, relative to the study's file or shipped.
        title: in the table.
        after: the row, of the same seed, whose model this one starts from (`init_from`).
        minutes: of one core, for training and measuring, on the machine that the study names.
    """

    config: str
    title: str
    after: str | None = None
    minutes: float = 10.0


@dataclass(frozen=True)
class Study:
    """A study of tokenizers on emoji.

    Attributes:
        out: folder of the runs, OUT/ROW-SEED.
        data: the folder of `unitok data emoji`.
        results: folder of the finished rows, one small file per row and seed, which are kept and committed.
        baseline: the row that the others are compared with.
        splits: held-out splits that are measured.
        overrides: config keys of every row, such as steps=4 for a trial.
        limit: images per split in a trial; None = all.
    """

    out: str
    data: str
    results: str
    baseline: str
    rows: dict[str, Row]
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    splits: list[str] = field(default_factory=lambda: ["pairs", "unseen"])
    overrides: list[str] = field(default_factory=list)
    limit: int | None = None

    def check(self) -> None:
        """
        Raises:
            UserError: a name or a reference to a row is not valid.
        """
        for name, row in self.rows.items():
            if not _NAME.fullmatch(name):
                raise UserError(f"rows: {name!r} must be lower-case letters, digits and underscores.")
            if row.after is not None and (row.after not in self.rows or row.after == name):
                raise UserError(f"rows.{name}.after is {row.after!r}: expected another row.")
        if self.baseline not in self.rows:
            raise UserError(f"baseline is {self.baseline!r}.{did_you_mean(self.baseline, self.rows)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or not self.splits:
            raise UserError("seeds and splits must be lists of different values, with one value at least.")


class RowRun(NamedTuple):
    """One row with one seed."""

    row: str
    seed: int
    config: str
    overrides: list[str]
    run_dir: Path
    result: Path
    needs: Path | None  # the run directory that it starts from
    minutes: float

    @property
    def name(self) -> str:
        return self.run_dir.name


def load_study(path: str) -> Study:
    """The validated YAML of a study; every row's config is read as well.

    Raises:
        UserError: an unknown key, a wrong value, or a config that is missing or invalid.
    """
    study = build_config(Study, read_yaml(path))
    configs = {name: _find_config(path, row.config) for name, row in study.rows.items()}
    rows = {name: Row(configs[name], row.title, row.after, row.minutes) for name, row in study.rows.items()}
    study = Study(**{**vars(study), "rows": rows})
    for job in study_jobs(study, study.seeds[:1]):
        try:
            load_run_config(job.config, job.overrides)
        except UserError as error:
            raise UserError(f"{path}: row {job.row}: {error}") from error
    return study


def _find_config(path: str, config: str) -> str:
    beside = os.path.normpath(os.path.join(os.path.dirname(path), config))
    return beside if os.path.exists(beside) else config


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
            run_dir = Path(study.out, f"{name}-{seed}")
            needs = Path(study.out, f"{row.after}-{seed}") if row.after else None
            overrides = [f"out={run_dir}", f"seed={seed}", *study.overrides]
            if needs:
                overrides.append(f"init_from={needs / 'model'}")
            result = Path(study.results, f"{name}-{seed}.json")
            jobs.append(RowRun(name, seed, row.config, overrides, run_dir, result, needs, row.minutes))
    jobs = [job for job in jobs if not only or job.row in only]
    return sorted(jobs, key=lambda job: job.needs is not None)  # stable


def settings_digest(job: RowRun) -> str:
    """A hash of everything in a job's config but paths: a result of other settings is not this row's."""
    config: dict[str, Any] = to_dict(load_run_config(job.config, job.overrides))
    ignored = ("out", "init_from", "resume_from", "stop_at", "checkpoint", "log", "profile")
    kept = {key: value for key, value in config.items() if key not in ignored}
    kept["from"] = job.needs.name if job.needs else None
    kept["engine"].pop("threads")  # of the machine
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
