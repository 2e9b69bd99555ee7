"""`unitok data check`: what a data set holds, what of it is broken, and whether its codes fit a tokenizer."""

import argparse

from open_unitok.core.errors import UserError
from open_unitok.training.data.check import _fingerprint, check


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to look at."""
    parser.add_argument("path", help="code folder, folder or glob of tars, .json, .jsonl or .txt")
    parser.add_argument("--tokenizer", help="visual tokenizer (or MLLM folder) that codes must belong to")
    parser.add_argument("--codes", help="code folder in which conversations look up their images")
    parser.add_argument(
        "--samples", type=int, default=0, help="look at so many, evenly spread (default: all)"
    )


def run(args: argparse.Namespace) -> None:
    """Print the report; raises UserError where something is broken."""
    wanted = _fingerprint(args.tokenizer) if args.tokenizer else None
    report = check(args.path, codes=args.codes, samples=args.samples, fingerprint=wanted)
    print("\n".join(report.lines))
    if report.broken:
        raise UserError(f"{len(report.broken):,} thing(s) in {args.path} are broken, as listed above.")
