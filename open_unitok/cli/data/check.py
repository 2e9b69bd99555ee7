"""`unitok data check`: summarise a data set, list broken samples, compare its codes with a tokenizer."""

import argparse

from open_unitok.core.errors import UserError
from open_unitok.core.files import tokenizer_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PATH and the tokenizer or codes to compare with."""
    parser.add_argument("path", help="code folder, folder, glob or URL of tar shards, .json, .jsonl or .txt")
    parser.add_argument("--tokenizer", help="visual tokenizer or MLLM folder whose codes they must be")
    parser.add_argument("--codes", help="code folder with the images of conversations")
    parser.add_argument(
        "--samples",
        type=int,
        help="number of evenly spaced samples to check, 0 for all (default: all up to 5,000)",
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="threads that read and decode samples (default: 2)"
    )


def run(args: argparse.Namespace) -> None:
    """Print the report; raises UserError if something is broken."""
    from open_unitok.tokenizer import UniTok
    from open_unitok.training.data.check import check_dataset

    # codes of another tokenizer would train without an error: compare fingerprints
    fingerprint = None
    if args.tokenizer:
        fingerprint = UniTok.from_pretrained(tokenizer_path(args.tokenizer)).fingerprint()
    report = check_dataset(
        args.path, codes=args.codes, samples=args.samples, workers=args.workers, fingerprint=fingerprint
    )
    print("\n".join(report.lines))
    if report.broken:
        raise UserError(f"{args.path} has {len(report.broken):,} problem(s), listed above.")
