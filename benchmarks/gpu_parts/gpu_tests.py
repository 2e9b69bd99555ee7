"""Correctness: every test of the project that needs a GPU (`pytest -m gpu`)."""

from pathlib import Path
from typing import Any

from .report import Report

FOLDER = Path(__file__).parents[2] / "tests" / "gpu"


class Recorder:
    """A plugin of pytest that writes a row when a test ends, so that a killed run leaves the tests before."""

    def __init__(self, report: Report):
        self.report, self.counts = report, {"passed": 0, "failed": 0, "skipped": 0}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called after set-up, call and tear-down of each test."""
        if report.when != "call" and report.outcome == "passed":
            return
        name = report.nodeid.rpartition("/")[2]
        self.counts[report.outcome] += 1
        row = {"outcome": report.outcome, **self.report.measured(seconds=report.duration)}
        if report.outcome == "failed":
            lines = str(report.longrepr).splitlines()
            # pytest marks the lines of the error
            row["failed"] = next((line[1:].strip() for line in lines if line.startswith("E ")), "")[:300]
        elif report.outcome == "skipped":
            row["reason"] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else "")
        self.report.rows[name] = row
        self.report.write()


def run(report: Report) -> None:
    """One row per test, and "all" with the counts."""
    report.row("all", run_tests, report)


def run_tests(report: Report) -> dict[str, Any]:
    """Run the tests in this process.

    Raises:
        RuntimeError: no test ran, or pytest itself failed.
    """
    import pytest

    recorder = Recorder(report)
    # compilation takes longest: last, in case the time is over
    files = sorted(FOLDER.glob("test_*.py"), key=lambda file: "compile" in file.name)
    code = pytest.main(["-m", "gpu", "-p", "no:cacheprovider", "-q", *map(str, files)], plugins=[recorder])
    counts = recorder.counts
    if code not in (0, 1) or not counts["passed"] + counts["failed"]:
        raise RuntimeError(f"pytest ended with {int(code)} after {counts}")
    # not "failed" and "skipped": those are keys of a row that has no result
    return {f"tests_{outcome}": count for outcome, count in counts.items()}
