"""`unitok doctor`: check hardware, optional packages and versions, with the cost of each missing one."""

import argparse

from open_unitok.doctor import machine, package_versions, speed, tested_devices


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`unitok doctor` takes no options."""


def run(args: argparse.Namespace) -> None:
    """Print one line per check. The exit code is always 0: nothing here makes every run fail."""
    parts = {
        "Machine": machine(),
        "Speed": speed(),
        "Tested devices": tested_devices(),
        "Versions": package_versions(),
    }
    for title, checks in parts.items():
        print(title)
        for check in checks:
            # what is tested says nothing about this machine
            mark = "-" if title == "Tested devices" else "!" if check.cost else "✓"
            print(f"  {mark} {check.name:<18} {check.found}")
            if check.cost:
                print(f"      {check.cost}")
