"""`unitok eval report RUN...`: runs beside published numbers, as one HTML page."""

import argparse
from pathlib import Path

from open_unitok.core.errors import UserError
from open_unitok.core.files import write_atomic
from open_unitok.eval.report.runs import read_runs, runs_page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="the --out of `unitok eval run`, or a folder in it"
    )
    parser.add_argument("--out", help="the page (default: report.html in the first RUN)")
    parser.add_argument("--title", default="Evaluation", help="the page's heading")
    parser.add_argument("--seed", type=int, default=0, help="of the lot that picks samples (default: 0)")


def run(args: argparse.Namespace) -> None:
    """Write the page and say where it is."""
    runs = read_runs(args.runs)
    path = Path(args.out) if args.out else Path(args.runs[0]) / "report.html"
    if path.is_dir():
        raise UserError(
            f"--out is {path}, a folder; give the name of the page, such as {path / 'report.html'}."
        )
    write_atomic(path, runs_page(runs, args.title, args.seed))
    print(path)
