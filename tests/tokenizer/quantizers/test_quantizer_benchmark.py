"""benchmarks/quantizers.py at toy scale, and its table."""

import json
import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[3] / "benchmarks"


def test_the_benchmark_and_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    script = runpy.run_path(str(FOLDER / "quantizers.py"))
    main = script["main"].__globals__

    def run_here(path, *arguments):
        monkeypatch.setattr(sys, "argv", ["quantizers.py", *arguments])
        script["main"]()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    # a process per kind takes seconds to start
    monkeypatch.setitem(main, "run_isolated", run_here)
    monkeypatch.setitem(main, "SIZES", dict(main["SIZES"]))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["quantizers.py", "--toy", "--repeats", "1", *arguments])
        script["main"]()
        return capsys.readouterr().out.splitlines()

    out = ["--out", str(tmp_path)]
    lines = call(*out)
    assert len(lines) == 2 + 7 + 7 + 4 + 2 and all(line.startswith("|") for line in lines[:-2])
    assert lines[-1].startswith("Similarities in blocks of 16 MiB; load average ")
    (file,) = tmp_path.glob("quantizers-*.json")
    before = json.loads(file.read_text())
    assert all({"peak_mib", "step_ratio", "block_mib"} <= entry.keys() for entry in before.values())
    assert call("--table", *out) == lines and json.loads(file.read_text()) == before
    # a part keeps the other rows
    call("--only", "pyramid", "--kinds", "ibq", *out)
    after = json.loads(file.read_text())
    assert after.keys() == before.keys() and after["8 x 4096 x 8, ibq"] == before["8 x 4096 x 8, ibq"]
