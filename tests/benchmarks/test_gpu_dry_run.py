"""All of benchmarks/gpu.py, and every GPU test, at toy sizes on the emulated CUDA device."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"),
]


@pytest.fixture(scope="module")
def modules():
    """table.py and report.py of gpu_parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield [importlib.import_module(f"gpu_parts.{name}") for name in ("table", "report", "budgets")]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """OUT of a dry run; the limits of its parts are far away."""
    folder = tmp_path_factory.mktemp("gpu")
    command = [
        sys.executable,
        ROOT / "benchmarks" / "gpu.py",
        "--out",
        folder,
        "--seconds",
        "6000",
        "--dry-run",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "0 failures", (
        done.stdout + (folder / "log.txt").read_text()[-4000:]
    )
    return folder


def numbers(value, path=()):
    """(keys, number) of every number in nested JSON."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers(item, (*path, key))
    elif isinstance(value, list):
        for item in value:
            yield from numbers(item, path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def test_every_part_runs_and_every_line_of_the_table_is_filled(out, modules):
    table, _, _ = modules
    summary = json.loads((out / "summary.json").read_text())
    assert not summary["failures"] and all(part["ran"]["rc"] == 0 for part in summary["parts"].values())
    for name, part in summary["parts"].items():
        assert not any("skipped" in row for row in part["rows"].values()), name
    for line in table.LINES:
        assert line.row in summary["parts"][line.part]["rows"], line.label
        assert table.NOTHING not in table.cell(line, summary["parts"]).split(), line.label
    tests = summary["parts"]["tests"]["rows"]["all"]
    assert tests["tests_passed"] > 30 and tests["tests_failed"] == 0
    resumed = [row.get("resumed") for row in summary["parts"]["engine"]["rows"].values()]
    assert resumed.count("bit for bit") >= 3
    assert sorted(path.name for path in out.iterdir()) == ["log.txt", "summary.json", "table.md"]


def test_no_number_of_a_dry_run_can_be_taken_for_a_real_one(out, modules):
    _, report, _ = modules
    summary = json.loads((out / "summary.json").read_text())
    assert summary["about"]["timing"] == report.NO_TIMING and "emulated" in summary["about"]["device"]
    assert (out / "table.md").read_text().splitlines()[0].count(report.NO_TIMING) == 1
    clocked = ("second", "ms", "mfu", "tflops", "gb", "gib", "floor", "share", "fastest", "slowest")
    for name, part in summary["parts"].items():
        assert part["rows"]["device"]["timing"] == report.NO_TIMING, name
        found = [(keys, value) for keys, value in numbers(part["rows"]) if keys[-1].split("_")[0] in clocked
                 or any(word in clocked for word in keys[-1].split("_"))]  # fmt: skip
        assert {keys for keys, _ in found} <= {("hardware", "host_memory_gib")}, (name, found)
    assert report.NO_TIMING in json.dumps(summary["parts"]["generation"]["rows"]["images, batch 64"])


def test_the_host_waits_within_the_budgets(out, modules):
    parts = json.loads((out / "summary.json").read_text())["parts"].items()
    rows = {f"{part}/{name}": row for part, found in parts for name, row in found["rows"].items()}
    counted = {name: row for name, row in rows.items() if "budget" in row}
    assert len(counted) >= len(modules[2].WAITS) > 8
    assert not {name: row for name, row in counted.items() if row["over"]}
