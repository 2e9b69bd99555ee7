"""`unitok eval compare A B`: test with a paired bootstrap whether run B is better than run A."""

import argparse

from open_unitok.core.errors import UserError
from open_unitok.eval.report.compare import compare, comparison_table, difference_notes, result_folders


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A B."""
    parser.add_argument("a", help="results folder of one benchmark, or a folder of several")
    parser.add_argument("b", help="results to compare with A")


def run(args: argparse.Namespace) -> None:
    """Print one table per benchmark that both runs have."""
    a, b = result_folders(args.a), result_folders(args.b)
    # one result on each side: compare() reports if the benchmarks differ
    if len(a) == len(b) == 1:
        b = dict(zip(a, b.values())) if set(a) != set(b) else b
    shared = [name for name in a if name in b]
    if not shared:
        raise UserError(f"{args.a} has {', '.join(a)}, {args.b} has {', '.join(b)}: no benchmark in common.")
    failed = []
    for name in shared:
        # one benchmark that cannot be compared does not hide the others
        try:
            print(comparison_table(name, compare(a[name], b[name])))
            for note in difference_notes(a[name], b[name]):
                print(f"  ! {note}")
        except UserError as error:
            if len(shared) == 1 and len(a) == len(b) == 1:
                raise
            failed.append(name)
            print(f"{name}: {error}")
    for name in sorted(set(a) ^ set(b)):
        print(f"{name}: only {args.a if name in a else args.b} has it")
    if len(failed) == len(shared):
        raise UserError(f"{args.a} and {args.b}: nothing could be compared; see above.")
