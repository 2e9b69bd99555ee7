"""Correctness: every test of the project that needs a GPU (`pytest -m gpu`)."""

import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from .report import Report

ROOT = Path(__file__).parents[2]


def run(report: Report) -> None:
    """One row per test, and "all" with the counts."""
    report.row("all", run_tests, report)


def run_tests(report: Report) -> dict[str, Any]:
    """Run the tests in this process; add a row for each.

    Raises:
        RuntimeError: no test ran, or pytest itself failed.
    """
    import pytest

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "junit.xml"
        code = pytest.main(["-m", "gpu", "-p", "no:cacheprovider", "-q", "--junitxml", str(file),
                            str(ROOT / "tests" / "gpu")])  # fmt: skip
        sys.stdout.flush()
        cases = ElementTree.parse(file).getroot().iter("testcase") if file.exists() else ()
        counts = {"passed": 0, "failed": 0, "skipped": 0}
        for case in cases:
            outcome, reason = _outcome(case)
            counts[outcome] += 1
            row: dict[str, Any] = {"outcome": outcome, **report.measured(seconds=float(case.get("time", 0)))}
            if outcome == "failed":
                row["failed"] = reason
            elif reason:
                row["reason"] = reason
            report.rows[f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"] = row
    if code not in (0, 1) or not counts["passed"] + counts["failed"]:
        raise RuntimeError(f"pytest ended with {int(code)} after {counts}")
    # not "failed" and "skipped": those are keys of a row that has no result
    return {f"tests_{outcome}": count for outcome, count in counts.items()}


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    for kind, outcome in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        found = case.find(kind)
        if found is not None:
            return outcome, (found.get("message") or "").splitlines()[0][:300]
    return "passed", ""
