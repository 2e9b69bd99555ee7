"""`unitok demo`: from nothing to a model that generates and answers."""

import argparse
import shlex
from pathlib import Path

from open_unitok.cli import main
from open_unitok.demo import CONFIGS, HOME, Timings, alone_in, phases, read_configs, write_configs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to work, and with which configs."""
    parser.add_argument("--out", default=HOME, help=f"folder of the run (default: {HOME})")
    parser.add_argument("--configs", help=f"folder with {', '.join(CONFIGS)} (default: the shipped ones)")


def run(args: argparse.Namespace) -> None:
    """Run all phases, or those that are left, and print the table."""
    out = Path(args.out)
    texts = read_configs(out, args.configs)
    with alone_in(out):
        timings = Timings(out / "phases.json")
        write_configs(out, texts, timings)
        for name, commands in phases(out):
            print(f"\n=== {name}", flush=True)
            if timings.finished(name):
                print("done before")
                continue
            with timings.phase(name):
                for command in commands:
                    print(f"$ unitok {shlex.join(command)}", flush=True)
                    main.run(command)
        from open_unitok.eval.report.demo import text_table, write_report

        write_report(out, timings.rows)
        minutes = sum(row["seconds"] for row in timings.rows) / 60
        again = [row["name"] for row in timings.rows if row["calls"] > 1]
        stopped = f" ({', '.join(again)} stopped and resumed)" if again else ""
        print(f"\n{text_table(out)}\n\n{minutes:.1f} minutes in all{stopped}; look at {out / 'report.html'}")
