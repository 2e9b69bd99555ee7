"""`unitok eval score`: score answers that are on disk, without a model."""

import argparse

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing
from open_unitok.eval.core.harness import read_run_metadata, score_run
from open_unitok.eval.registry import find_benchmark, select_options

from .run import add_benchmark_options, given_options, result_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options, and the scoring options of every benchmark."""
    parser.add_argument("folder", help="the folder of one benchmark, or one that holds several")
    parser.add_argument(
        "--partial", action="store_true", help="score an incomplete run; missing answers are wrong"
    )
    add_benchmark_options(parser, scoring_only=True)


def run(args: argparse.Namespace) -> None:
    """Score and print one table per benchmark."""
    folder = existing(args.folder)
    folders = (
        [folder] if (folder / "run.json").exists() else sorted(p.parent for p in folder.glob("*/run.json"))
    )
    if not folders:
        raise UserError(f"{folder} holds no answers of `unitok eval run` (no run.json).")
    # run.json, not the name of the folder: a run may have been renamed
    benchmarks = {path: find_benchmark(read_run_metadata(path)["benchmark"]) for path in folders}
    options = select_options(given_options(args), benchmarks.values())
    for path, benchmark in benchmarks.items():
        print(result_table(score_run(benchmark, path, options[benchmark.name], args.partial)))
