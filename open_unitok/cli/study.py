"""`unitok study CONFIG`: train and measure every row of a study, then write its table and page."""

import argparse
import os
import sys
from pathlib import Path

from open_unitok.core import distributed
from open_unitok.core.errors import UserError
from open_unitok.core.files import write_atomic


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG and which of its rows."""
    parser.add_argument("config", help="YAML of the study, e.g. configs/study/tokenizers.yaml")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="run these rows only")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="run these seeds only")
    parser.add_argument("--part", type=int, metavar="N", help="run one part of the plan, from 1")
    parser.add_argument("--workers", type=int, help="rows at a time (default: one per core)")
    parser.add_argument("--plan", action="store_true", help="print parts and minutes, and run nothing")
    parser.add_argument("--table", action="store_true", help="write table and page of the finished rows only")


def run(args: argparse.Namespace) -> None:
    """Run the unfinished rows, then write OUT/table.md, table.csv and index.html."""
    from open_unitok.study.config import load_study, study_jobs
    from open_unitok.study.page import study_page
    from open_unitok.study.run import is_finished, part_minutes, plan_parts, run_jobs
    from open_unitok.study.table import csv_table, markdown_table

    study = load_study(args.config)
    for seed in args.seeds or ():
        if seed not in study.seeds:
            raise UserError(f"--seeds {seed}: the study has seeds {', '.join(map(str, study.seeds))}.")
    # the CPUs this process may use, not those of the machine
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = args.workers or (1 if distributed.world_size() > 1 else cores)
    jobs = study_jobs(study, args.seeds, args.only)
    parts = plan_parts(jobs, workers)
    if args.part is not None:
        if not 1 <= args.part <= len(parts):
            raise UserError(f"--part {args.part}: the plan has parts 1 to {len(parts)}.")
        jobs = parts[args.part - 1]
    if args.plan:
        for number, part in enumerate(parts, 1):
            done = sum(is_finished(study, job) for job in part)
            print(f"part {number}: {part_minutes(part, workers):.0f} minutes, {done} of {len(part)} finished")
            print(f"  {' '.join(job.name for job in part)}")
        hours = sum(part_minutes(part, workers) for part in parts) / 60
        print(f"{len(jobs)} runs, {hours:.1f} hours on {workers} cores")
        return
    failed = [] if args.table else run_jobs(study, jobs, workers)
    if distributed.is_main():
        write_atomic(Path(study.out, "table.md"), markdown_table(study))
        write_atomic(Path(study.out, "table.csv"), csv_table(study))
        write_atomic(Path(study.out, "index.html"), study_page(study, f"Study {Path(args.config).stem}"))
        print(f"{study.out}: table.md, table.csv and index.html are written")
    for line in failed:
        print(f"unitok: {line}", file=sys.stderr)
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} runs failed; the others are finished.")
