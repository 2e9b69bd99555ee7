"""Every row of the shipped studies at the scale of seconds; repeated rows give the same numbers."""

import dataclasses
import importlib
import json
import subprocess
import sys
import types

import pytest
import yaml

from open_unitok.cli.main import main
from open_unitok.eval.tokenizer import linear_probe
from open_unitok.study import measure, run
from open_unitok.study.columns import study_tables
from open_unitok.study.jobs import study_jobs
from open_unitok.study.run import run_jobs
from open_unitok.study.table import make_cells

from .small import run_here, small_downstream, small_tokenizers, write_scenes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
# of times: other load changes them
TIMES = ("step_seconds", "encode_ms", "decode_ms")
# rows that learn no captions
CAPTIONLESS = ("no_contrast", "coda", "gaussian", "gaussian_fsq", "vqkd", "two_encoders")


@pytest.fixture(scope="module")
def study(emoji, tmp_path_factory):
    pytest.importorskip("efficientnet_lite_pytorch")
    return small_tokenizers(emoji, tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def downstream(tmp_path_factory):
    pytest.importorskip("efficientnet_lite_pytorch")
    scenes = write_scenes(tmp_path_factory.mktemp("scenes"))
    return small_downstream(scenes, tmp_path_factory.mktemp("downstream"))


@pytest.fixture
def few_repeats(monkeypatch):
    """What takes most of the time of a small row, and is not what these tests are about."""
    monkeypatch.setattr(measure, "TIMED_REPEATS", 1)
    monkeypatch.setattr(measure, "TIMED_BATCH", 2)
    monkeypatch.setattr(linear_probe, "LBFGS_STEPS", 5)


def test_every_tokenizer_trains_and_is_measured(study, monkeypatch, few_repeats):
    results = {job.row: run_here(study, job, monkeypatch) for job in study_jobs(study)}
    assert results.keys() == study.rows.keys()
    for name, result in results.items():
        columns, quality = result["columns"], result["splits"]["pairs"]
        assert columns["tokens"] > 0 and columns["parameters"] > 0 and columns["step_seconds"] > 0, name
        assert columns["encode_ms"] > 0 and columns["decode_ms"] > 0, name
        no_pixels = name in ("no_reconstruction", "vqkd")  # their decoder learns nothing, so no number of it
        assert no_pixels == (quality["psnr"] is None) == (quality["frechet"] is None), name
        assert no_pixels or (quality["psnr"] > 0 and 0 <= quality["emoji"] <= 1 and quality["frechet"] > 0), (
            name
        )
        assert {len(scores) for scores in result["images"]["pairs"].values()} == {3}, name
        continuous = name in ("continuous", "gaussian")
        assert continuous or (columns["bits"] > 0 and 0 < quality["usage"] <= 1), name
        assert (columns["bits"] is None) == (name == "continuous"), name
        captioned = name not in CAPTIONLESS
        assert ("retrieval" in quality) == ("zeroshot_category" in quality) == captioned, name
        # every empty cell says why
        empty = {key for key in (*columns, *quality) if (columns | quality)[key] is None}
        assert empty <= result["reasons"].keys() and ("retrieval" in result["reasons"]) == (not captioned), (
            name
        )
        assert len(result["curve"]) == 2 and study_results(study, name, ".webp").exists() != no_pixels, name
    base = results["base"]
    assert base["columns"]["tokens"] == 16 and base["columns"]["bits"] == 768
    for table in study_tables(study):
        cells = dict(zip((c.key for c in table.columns), make_cells(study, table)["base"]))
        assert all(cell.value is not None for cell in cells.values()), cells


def study_results(study, name, suffix):
    return study_jobs(study, [0], [name])[0].result.with_suffix(suffix)


def test_every_downstream_row_is_trained_and_measured(downstream, monkeypatch, few_repeats):
    results = {job.row: run_here(downstream, job, monkeypatch) for job in study_jobs(downstream)}
    assert results.keys() == downstream.rows.keys()
    keys = {column.key for table in study_tables(downstream) for column in table.columns}
    for name, result in results.items():
        known = {k: v for k, v in (result["columns"] | result["splits"]["test"]).items() if v is not None}
        assert keys - known.keys() == result["reasons"].keys() & keys, name
        whole = name not in ("joint_dual", "generating")
        assert ("classes_none" in known) == ("probe_latents" in known) == ("bits" in known) == whole, name
        assert ("vqa" in known) == (name != "generating") and "geneval" in known, name
        for column, scores in result["images"]["test"].items():
            assert sum(scores) / len(scores) == pytest.approx(known[column], abs=1e-3), (name, column)
    assert results["unitok_k8"]["columns"]["bits"] == 4 * 48 and results["ibq"]["columns"]["bits"] == 4 * 9
    assert [scale for scale, _ in results["vit"]["guided"]] == [1, 2]
    assert results["joint_dual"]["reasons"]["psnr"] == "n/a: the tokenizer is that of unitok_k8-0"


def test_a_row_killed_at_each_link_goes_on_to_the_same_numbers(downstream, tmp_path, monkeypatch):
    """Each command of a row is killed once, a training after one step, and the study is started anew."""
    row = dataclasses.replace(downstream.rows["unitok_k8"], parts=["classes"])
    jobs = []
    for name in ("once", "again"):
        where = {"out": f"{tmp_path}/{name}", "results": f"{tmp_path}/{name}/results"}
        study = dataclasses.replace(downstream, **where, rows={"unitok_k8": row}, claims=[])
        jobs.append((study, study_jobs(study)[0]))
    run_here(*jobs[0], monkeypatch)
    calls = []

    def killed_once(arguments, **_):
        module, command = arguments[2], arguments[3:]
        first = (module, command) not in calls
        calls.append((module, command))
        if command[0] == "train":
            main([*command, "stop_at=1"] if first else command)
        elif not first and module == "open_unitok":
            main(command)
        elif not first:
            monkeypatch.setattr(sys, "argv", [module, *command])
            importlib.import_module(module).main()
        return subprocess.CompletedProcess(arguments, -9 if first else 0)

    fake = types.SimpleNamespace(run=killed_once, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(run, "subprocess", fake)
    starts = 0
    while run_jobs([jobs[1]], 1):
        starts += 1
    assert starts == len(jobs[1][1].commands) + 1  # the last one measures
    assert same(jobs[0][1]) == same(jobs[1][1])
    assert run_jobs([jobs[1]], 1) == [] and len(calls) == sum(range(1, starts + 1)) + starts


def same(job):
    """What two runs of a job must have in common: all but times and the day."""
    result = json.loads(job.result.read_text())
    for key in TIMES:
        result["columns"].pop(key)
    return {key: value for key, value in result.items() if key != "date"}


def test_a_killed_tokenizer_goes_on_and_repeats_to_the_same_numbers(study, tmp_path, monkeypatch, capsys):
    tasks = []
    for name in ("once", "again"):
        changed = dataclasses.replace(study, out=f"{tmp_path}/{name}", results=f"{tmp_path}/{name}/results")
        tasks.append((changed, study_jobs(changed, [0], ["base"])[0]))
    run_here(*tasks[0], monkeypatch)
    main([*tasks[1][1].commands[0], "stop_at=1"])  # what a kill leaves
    capsys.readouterr()
    assert run_jobs(tasks[1:], 1) == []  # in processes of their own
    assert "base-0: started" in capsys.readouterr().out
    assert same(tasks[0][1]) == same(tasks[1][1])
    assert run_jobs(tasks[1:], 1) == [] and "started" not in capsys.readouterr().out


def test_a_row_that_fails_is_named_and_the_others_are_run(study, tmp_path):
    wrong = {"inherits": study.rows["base"].config, "data": {"sources": [{"path": "nowhere/*.tar"}]}}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(wrong))
    bad = dataclasses.replace(study.rows["base"], config=str(tmp_path / "bad.yaml"))
    where = {"out": f"{tmp_path}/runs", "results": f"{tmp_path}/results"}
    changed = dataclasses.replace(study, **where, rows={"bad": bad, "base": study.rows["base"]}, claims=[])
    (line,) = run_jobs([(changed, job) for job in study_jobs(changed)], 2)
    assert line.startswith("bad-0: `open_unitok train") and "failed with 2" in line and ".log" in line
    log = (tmp_path / "runs" / "logs" / "bad-0.log").read_text()
    assert "unitok: error:" in log and "nowhere" in log
    assert (tmp_path / "results" / "base" / "0.json").exists()
