"""`unitok eval score`: score answers that are already on disk, without a model."""

import argparse
from pathlib import Path

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing
from open_unitok.eval.registry import score_run

from .run import add_scoring, scoring_of, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("folder", help="the folder of one benchmark, or one that holds several")
    parser.add_argument(
        "--partial", action="store_true", help="score an incomplete run; what is missing is wrong"
    )
    add_scoring(parser)


def run(args: argparse.Namespace) -> None:
    """Score and print one table per benchmark."""
    folder = existing(args.folder)
    folders = (
        [folder] if (folder / "run.json").exists() else sorted(p.parent for p in folder.glob("*/run.json"))
    )
    if not folders:
        raise UserError(f"{Path(args.folder)} holds no answers of `unitok eval run` (no run.json).")
    for one in folders:
        print(table(score_run(one, args.partial, scoring_of(args))))
