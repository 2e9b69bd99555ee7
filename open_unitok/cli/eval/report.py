"""`unitok eval report RUN...`: an HTML report of runs, with published numbers for comparison."""

import argparse
from pathlib import Path

from open_unitok.core.errors import UserError
from open_unitok.core.files import write_atomic
from open_unitok.eval.report.runs import read_runs, runs_page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN ... [--out FILE]."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="the --out folder of `unitok eval run`, or a folder in it"
    )
    parser.add_argument("--out", help="HTML file to write (default: report.html in the first RUN)")
    parser.add_argument("--title", default="Evaluation", help="heading (default: Evaluation)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of samples (default: 0)")


def run(args: argparse.Namespace) -> None:
    """Write the report and print its path."""
    runs = read_runs(args.runs)
    path = Path(args.out) if args.out else Path(args.runs[0]) / "report.html"
    if path.is_dir():
        raise UserError(f"--out is {path}, a folder; expected a file such as {path / 'report.html'}.")
    write_atomic(path, runs_page(runs, args.title, args.seed))
    print(path)
