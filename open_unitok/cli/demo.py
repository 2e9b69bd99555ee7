"""`unitok demo`: train a small model from scratch, use it, evaluate it and write a report."""

import argparse
from pathlib import Path

from open_unitok.demo import DEMO_CONFIGS, DEMO_DIR, run_demo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Output folder and configs."""
    parser.add_argument("--out", default=DEMO_DIR, help=f"output folder (default: {DEMO_DIR})")
    parser.add_argument(
        "--configs", help=f"folder with {', '.join(DEMO_CONFIGS)} (default: the shipped ones)"
    )
    parser.add_argument(
        "--processes",
        type=int,
        help="that train together, one thread each; 1: all threads (default: one per core)",
    )


def run(args: argparse.Namespace) -> None:
    """Run the unfinished phases and print the table of results."""
    run_demo(Path(args.out), args.configs, args.processes)
