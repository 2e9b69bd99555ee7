"""`unitok doctor`: what this machine has, and what each missing thing costs."""

import argparse

from open_unitok.doctor import machine, speed, versions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`unitok doctor` takes no options."""


def run(args: argparse.Namespace) -> None:
    """Print one line per check; the exit code stays 0, since nothing here stops a run by itself."""
    for title, checks in (("Machine", machine()), ("Speed", speed()), ("Versions", versions())):
        print(title)
        for check in checks:
            print(f"  {'!' if check.cost else '✓'} {check.name:<18} {check.found}")
            if check.cost:
                print(f"      {check.cost}")
