"""The demo end to end with configs that take seconds: it resumes after a kill, and errors are one line."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from open_unitok import demo as demo_module
from open_unitok.cli.main import main
from open_unitok.core.errors import UserError
from open_unitok.core.processes import FolderLock
from open_unitok.demo import Timings, read_configs, run_demo, training_processes, write_configs
from open_unitok.eval.judges.scenes_detector import ScenesDetector, same_scene
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.images import to_pil
from open_unitok.training.scenes.config import SceneConfig
from open_unitok.training.scenes.dataset import load_config

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "tests" / "tiny_demo"
COMMAND = [sys.executable, "-m", "open_unitok", "demo", "--configs", str(CONFIGS), "--out"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def demo(out: pathlib.Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, str(out)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900
    )


def kill_when(out: pathlib.Path, appears: str) -> None:
    """Run the demo until `OUT/appears` exists, then SIGKILL it."""
    process = subprocess.Popen(
        [*COMMAND, str(out)], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 600
        while not (out / appears).exists():
            assert process.poll() is None, f"the demo ended before {appears} existed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def results(out: pathlib.Path) -> dict:
    """metrics.json without what may differ between runs: times and the paths of the run directory."""
    metrics = json.loads((out / "metrics.json").read_text().replace(out.as_posix(), "OUT"))
    del metrics["phases"]
    return metrics


@pytest.mark.slow
def test_demo_killed_twice_gives_the_same_results(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    first = demo(whole)
    assert first.returncode == 0, first.stderr
    kill_when(killed, "tokenizer/checkpoints/step-00000008")
    kill_when(killed, "finetune/checkpoints/step-00000004")
    assert not (killed / "metrics.json").exists()
    last = demo(killed)
    assert last.returncode == 0, last.stderr
    assert results(killed) == results(whole)
    calls = {row["name"]: row["calls"] for row in json.loads((killed / "phases.json").read_text())}
    assert calls["tokenizer"] == 2 and calls["finetune"] == 2 and calls["pretrain"] == 1

    # a finished run only writes the report: no training, identical page
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*.safetensors")}
    page = (whole / "report.html").read_bytes()
    rerun = demo(whole)
    assert rerun.returncode == 0, rerun.stderr
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*.safetensors")} == before
    assert (whole / "report.html").read_bytes() == page
    for word in ("Reconstruction", "Question answering", "GenEval-style"):
        assert word in rerun.stdout

    # random codes decode to an image, but not to the scene of the prompt
    unitok = UniTok.from_pretrained(whole / "tokenizer" / "model")
    detect = ScenesDetector.from_file(whole / "data")
    scenes = [row["scene"] for row in json.loads((whole / "data" / "test" / "captions.json").read_text())]
    shape = (len(scenes), unitok.config.num_visual_tokens, unitok.config.num_codebooks)
    codes = torch.randint(unitok.config.codebook_size, shape, generator=torch.Generator().manual_seed(0))
    images = [np.asarray(to_pil(pixels)) for pixels in unitok.decode(codes).detach()]
    assert np.mean([same_scene(*pair) for pair in zip(detect(images), scenes)]) <= 0.05

    # other configs in the same folder are rejected
    other = tmp_path / "other"
    shutil.copytree(CONFIGS, other)
    text = (other / "tokenizer.yaml").read_text()
    (other / "tokenizer.yaml").write_text(text.replace("steps: 24", "steps: 25"))
    rejected = subprocess.run(
        [*COMMAND[:4], "--configs", str(other), "--out", str(whole)], cwd=ROOT, capture_output=True, text=True
    )
    assert rejected.returncode == 2 and "differs from tokenizer.yaml" in rejected.stderr
    assert rejected.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("config", "change", "out", "words"),
    [
        ("finetune.yaml", ("steps:", "stepz:"), "out", "Did you mean 'steps'"),
        ("finetune.yaml", ("steps: 24", "steps: many"), "out", "finetune.yaml: steps is 'many'"),
        ("scenes.yaml", ("train:", "trian:"), "out", "trian"),
        ("pretrain.yaml", None, "out", "pretrain.yaml does not exist"),
        ("scenes.yaml", None, "out", "scenes.yaml does not exist"),
        ("scenes.yaml", ("", ""), "o: {u}t", "letters, digits"),
        ("scenes.yaml", ("", ""), "file", "is a file"),
        ("scenes.yaml", ("", ""), "file/below/it", "is a file"),
    ],
)
def test_invalid_configs_stop_before_anything_is_written(tmp_path, capsys, config, change, out, words):
    configs = tmp_path / "configs"
    shutil.copytree(CONFIGS, configs)
    (tmp_path / "file").write_text("")
    if change is None:
        (configs / config).unlink()
    else:
        (configs / config).write_text((configs / config).read_text().replace(*change))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--configs", str(configs), "--out", str(tmp_path / out)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1, error
    assert sorted(tmp_path.rglob("*")) == before


def test_training_runs_as_processes_that_divide_the_batch(tmp_path, monkeypatch, capfd):
    """One thread each, all with the launch's variables; one that fails ends the others."""
    config = tmp_path / "train.yaml"
    config.write_text("batch_size: 12\n")
    assert [training_processes(str(config), n) for n in (1, 2, 5, 6, 64)] == [1, 2, 4, 6, 12]
    (tmp_path / "open_unitok.py").write_text(
        "import os, sys, time\n"
        "rank = os.environ['RANK']\n"
        "print(sys.argv[1], rank, os.environ['WORLD_SIZE'], os.environ['OMP_NUM_THREADS'], flush=True)\n"
        "open('pid' + rank, 'w').write(str(os.getpid()))\n"
        "bad = sys.argv[2].endswith('bad.yaml')\n"
        "while bad and not os.path.exists('pid0'): time.sleep(0.01)\n"
        "sys.exit(3) if bad and rank == '1' else time.sleep(60 * bad)\n"
    )
    monkeypatch.chdir(tmp_path)  # -m looks here first
    demo_module.run_phase_command(["train", str(config)], 2)
    assert sorted(capfd.readouterr().out.splitlines()) == ["train 0 2 1", "train 1 2 1"]
    bad = tmp_path / "bad.yaml"
    bad.write_text("batch_size: 2\n")
    (tmp_path / "pid0").unlink()
    with pytest.raises(UserError, match="failed, see above"):
        demo_module.run_phase_command(["train", str(bad)], 2)
    with pytest.raises(ProcessLookupError):  # it would sleep for a minute
        os.kill(int((tmp_path / "pid0").read_text()), 0)


def test_a_config_may_change_until_its_phase_has_started(tmp_path):
    out, configs = tmp_path / "out", tmp_path / "configs"
    shutil.copytree(CONFIGS, configs)
    timings = Timings(out / "phases.json")
    write_configs(out, read_configs(out, str(configs)), timings)
    with timings.phase("data"), timings.phase("tokenizer"):
        pass
    later = configs / "finetune.yaml"
    later.write_text(later.read_text().replace("steps: 24", "steps: 25"))
    write_configs(out, read_configs(out, str(configs)), Timings(out / "phases.json"))
    assert "steps: 25" in (out / "configs" / "finetune.yaml").read_text()
    later.write_text(later.read_text().replace("steps: 25", "steps: 26"))
    started = configs / "tokenizer.yaml"
    started.write_text(started.read_text().replace("steps: 24", "steps: 25"))
    with pytest.raises(UserError, match=r"differs from tokenizer\.yaml"):
        write_configs(out, read_configs(out, str(configs)), Timings(out / "phases.json"))
    assert "steps: 25" in (out / "configs" / "finetune.yaml").read_text()  # nothing was written


def test_seconds_before_a_kill_are_counted(tmp_path):
    path = tmp_path / "phases.json"
    with Timings(path, interval=0.02).phase("tokenizer"):
        deadline = time.monotonic() + 30
        while json.loads(path.read_text())[0]["seconds"] < 0.1:  # the state that a kill here would leave
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert not Timings(path).finished("tokenizer")
    timings = Timings(path)
    before = timings.rows[0]["seconds"]
    with timings.phase("tokenizer"):
        pass
    row = Timings(path).rows[0]
    assert row["calls"] == 2 and row["finished"] and row["seconds"] >= before


@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="no /proc")
def test_memory_of_processes_that_a_phase_starts_is_counted(tmp_path):
    path, script = (
        tmp_path / "phases.json",
        "data = bytearray(b'1') * 400_000_000; print(1, flush=True); input()",
    )
    with Timings(path, interval=0.02).phase("tokenizer"):
        before = json.loads(path.read_text())[0]["peak_memory"]
        child = subprocess.Popen([sys.executable, "-c", script], stdin=-1, stdout=-1, text=True)
        assert child.stdout and child.stdout.readline()
        deadline = time.monotonic() + 30
        while json.loads(path.read_text())[0]["peak_memory"] < before + 400_000_000:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        child.communicate("end\n")


def test_two_demos_in_one_folder_are_rejected(tmp_path):
    lock, message = FolderLock(tmp_path, "unitok demo"), "Another unitok demo runs in"
    with lock, pytest.raises(UserError, match=message):
        run_demo(tmp_path)
    with FolderLock(tmp_path, "unitok demo"):  # the lock is released
        pass


@pytest.mark.parametrize("run", ["demo", "scenes"])
def test_shipped_configs_are_valid_and_out_replaces_their_base_folder(run):
    folder, base = ROOT / "configs" / run, f"runs/{run}"
    texts = read_configs(pathlib.Path("elsewhere"), str(folder))
    for name, text in texts.items():
        assert base in (folder / name).read_text() and base not in text and "elsewhere/" in text


def test_configs_without_a_base_folder_are_rejected(tmp_path):
    shutil.copytree(CONFIGS, tmp_path / "configs")
    path = tmp_path / "configs" / "tokenizer.yaml"
    path.write_text(path.read_text().replace("out: runs/demo/tokenizer", "out: tokenizer"))
    with pytest.raises(UserError, match="out is tokenizer; it must be inside a folder"):
        read_configs(tmp_path / "run", str(tmp_path / "configs"))


def test_the_demo_uses_the_default_scenes():
    expected = SceneConfig(ask_positions=True)
    assert load_config(str(ROOT / "configs" / "demo" / "scenes.yaml")) == expected
