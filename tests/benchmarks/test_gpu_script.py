"""benchmarks/gpu.py without a GPU: limits, killed and failing parts, what is on disk, the table, refusals."""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
CHILD = (
    "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
)


@pytest.fixture
def script(monkeypatch):
    """benchmarks/gpu.py as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "gpu", raising=False)
    return importlib.import_module("gpu")


@pytest.fixture
def reports(monkeypatch):
    """The module of `Report`."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_parts.report")


def arguments(script, out, **changes):
    given = {"out": out, "seconds": 600.0, "parts": list(script.PARTS), "toy": False, "dry_run": False}
    return argparse.Namespace(**{**given, **changes})


def children_of(pid):
    """Process ids in the session that `pid` led."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def test_a_part_that_hangs_is_killed_with_its_children(script, tmp_path):
    log = tmp_path / "log.txt"
    code = CHILD + "print('started', flush=True); time.sleep(60)"
    pids, original = [], subprocess.Popen

    class Recorded(original):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            pids.append(self.pid)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", Recorded)
        ran = script.run_limited([sys.executable, "-c", code], 3.0, log)
    assert ran["failed"] == "killed at its limit of 3 s" and ran["last"] == ["started"]
    assert ran["rc"] == -9
    for _ in range(100):  # a killed process takes a moment to go
        if not children_of(pids[0]):
            break
        time.sleep(0.05)
    assert not children_of(pids[0])


def test_a_part_that_fails_keeps_its_last_lines(script, tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("of an earlier part\n")
    ran = script.run_limited([sys.executable, "-c", "print('one'); raise SystemExit('two')"], 30, log)
    assert ran["rc"] == 1 and ran["failed"] == "exit status 1" and ran["last"] == ["one", "two"]
    good = script.run_limited([sys.executable, "-c", "print('three')"], 30, log)
    assert good["rc"] == 0 and "failed" not in good
    assert log.read_text() == "of an earlier part\none\ntwo\nthree\n"


def test_limits_share_what_is_left(script):
    names = list(script.PARTS)
    total = sum(part.seconds for part in script.PARTS.values())
    assert total <= 600 - script.RESERVE
    # every part uses its limit to the end: all of them fit
    left = 600 - script.RESERVE
    for name in names:
        limit = script.time_limit(name, names, left)
        assert limit >= script.PARTS[name].seconds * 0.99
        left -= limit
    assert left == pytest.approx(0, abs=1e-6)
    # a part that needs nothing leaves its time to the others; the last one may use all that is left
    assert script.time_limit(names[1], names, 500.0) > script.time_limit(names[1], names, 400.0)
    assert script.time_limit(names[-1], names, 100.0) == 100.0
    assert script.time_limit(names[-1], names, -5.0) == 0.0


def test_partial_rows_survive_and_all_parts_run(script, tmp_path, monkeypatch):
    """One part is killed in its second row, one fails, one never starts, one is fine."""
    writing = "import json, time; w = lambda rows: open({file!r}, 'w').write(json.dumps(rows)); "
    codes = {
        "facts": "w({'rates': {'bf16_tflops': 790.0, 'read_gb_per_second': 4000.0}})",
        "tests": "w({'all': {'tests_passed': 3, 'tests_failed': 0, 'tests_skipped': 1}}); time.sleep(60)",
        "codes": "w({'x': {'failed': 'ValueError: y'}}); raise SystemExit(3)",
        "mllm": "w({})",
    }

    def command(name, args, limit):
        file = str(args.out / f"{name}.json")
        return [sys.executable, "-c", writing.format(file=file) + codes[name]]

    monkeypatch.setattr(script, "part_command", command)
    monkeypatch.setattr(script, "time_limit", lambda name, *_: {"tests": 2.0, "mllm": 1.0}.get(name, 30.0))
    monkeypatch.setitem(script.PARTS, "tests", script.PARTS["tests"]._replace(least=1.0))
    # rows of an earlier run in the same folder that was killed
    for name in ("facts", "mllm"):
        (tmp_path / f"{name}.json").write_text('{"old": {}}')
    failures = script.run_all(arguments(script, tmp_path, parts=list(codes)))
    assert failures == [
        "tests: killed at its limit of 2 s",
        "codes: exit status 3",
        "codes: x: ValueError: y",
    ]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["failures"] == failures
    assert summary["parts"]["tests"]["rows"] == {
        "all": {"tests_passed": 3, "tests_failed": 0, "tests_skipped": 1}
    }
    assert "skipped" in summary["parts"]["mllm"]["ran"]
    assert not any("old" in part["rows"] for part in summary["parts"].values())
    # the parts' own files are in the summary
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "summary.json", "table.md"]
    table = (tmp_path / "table.md").read_text()
    assert "| bf16 product of 8192 x 8192 | 790 TFLOP/s |" in table
    assert "3 passed, 0 failed, 1 skipped" in table and "killed at its limit of 2 s" in table
    assert "- (not run)" in table and "3 failures." in table


def test_a_run_that_is_stopped_leaves_what_it_has(tmp_path):
    """SIGTERM, as of `timeout`, in the middle of a part: its rows are in the summary, its process is gone."""
    file = str(tmp_path / "facts.json")
    row = json.dumps({"a": {}})
    part = f"import time; f = open({file!r}, 'w'); f.write({row!r}); f.close(); time.sleep(60)"
    code = f"""
import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import gpu
gpu.part_command = lambda *_: [sys.executable, "-c", {part!r}]
gpu.cuda_available = lambda: True
gpu.main()
"""
    process = subprocess.Popen([sys.executable, "-c", code, "--out", str(tmp_path), "--parts", "facts"])
    for _ in range(600):
        if (tmp_path / "facts.json").exists():
            break
        time.sleep(0.05)
    time.sleep(0.5)  # the part writes its row
    process.terminate()
    assert process.wait(30) == 143
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["parts"]["facts"]["rows"] == {"a": {}}
    assert summary["failures"] == ["facts: stopped from outside"]


def test_wrong_arguments_and_no_device_are_one_line(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    for options, message in (
        ([], "--out DIR is required"),
        (["--out", str(tmp_path / "o"), "--seconds", "5"], "--seconds is 5; it must be 30 or more"),
        (["--out", str(tmp_path / "o"), "--seconds", "nan"], "--seconds is nan; it must be 30 or more"),
        (["--out", str(tmp_path / "o"), "--seconds", "inf"], "--seconds is inf; it must be 30 or more"),
        (["--out", __file__, "--dry-run"], "test_gpu_script.py is not a folder"),
        (["--table", str(tmp_path / "no.json")], "no.json is not the summary.json of a run"),
        (["--table", __file__], "test_gpu_script.py is not the summary.json of a run"),
        (["--out", str(tmp_path / "o"), "--parts", "fact"], "invalid choice: 'fact'"),
        (["--out", str(tmp_path / "o")], "there is no CUDA device: --dry-run goes through all parts"),
    ):
        done = subprocess.run([sys.executable, str(BENCHMARKS / "gpu.py"), *options],
                              capture_output=True, text=True, env=environment)  # fmt: skip
        assert done.returncode == 2 and message in done.stderr.splitlines()[-1], done.stderr
    assert not (tmp_path / "o").exists()


def test_rows_are_on_disk_one_by_one_and_failures_are_rows(reports, tmp_path):
    report = reports.Report("x", tmp_path, "cpu", 100.0, toy=False)

    def fails():
        raise ValueError("first line\nsecond")

    def exits():
        raise SystemExit(2)

    assert report.row("good", lambda number: {"number": number}, 3)
    assert json.loads((tmp_path / "x.json").read_text())["good"] == {"number": 3}
    assert not report.row("bad", fails) and not report.row("exit", exits)
    assert not report.row("late", dict, need=1e6)
    rows = json.loads((tmp_path / "x.json").read_text())
    assert rows["bad"] == {"failed": "ValueError: first line"} and rows["exit"] == {"failed": "SystemExit: 2"}
    assert "s left" in rows["late"]["skipped"] and "timing" not in rows["device"]


def test_a_toy_run_has_no_number_that_a_clock_gave(reports, tmp_path):
    report = reports.Report("x", tmp_path, "cpu", 100.0, toy=True)
    assert report.measured(seconds=1.5, mfu=0.4) == dict.fromkeys(("seconds", "mfu"), reports.NO_TIMING)
    assert json.loads((tmp_path / "x.json").read_text())["device"]["timing"] == reports.NO_TIMING
    real = reports.Report("y", tmp_path, "cpu", 100.0, toy=False)
    assert real.measured(seconds=1.5) == {"seconds": 1.5}


def test_the_table_of_an_empty_run_says_so(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    made = importlib.import_module("gpu_parts.table")
    lines = made.table({"about": {}, "parts": {}, "failures": []}).splitlines()
    assert sum("| - (not run) |" in line for line in lines) == len(made.LINES)
    assert len({line.label for line in made.LINES}) == len(made.LINES) and lines[-1] == "No failures."


def test_every_gpu_test_is_where_the_script_looks():
    marked = [path.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py")
              if "mark.gpu" in path.read_text() and path != Path(__file__)]  # fmt: skip
    assert marked and all(path.parent == Path("tests/gpu") for path in marked), marked
    listed = (ROOT / "CONTRIBUTING.md").read_text()
    assert all(f"`{path.name}`" in listed for path in marked)
