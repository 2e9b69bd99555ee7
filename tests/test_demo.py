"""The demo from end to end with configs of seconds: it goes on after a kill, and errors are one line."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "tests" / "tiny_demo"
COMMAND = [sys.executable, "-m", "open_unitok", "demo", "--configs", str(CONFIGS), "--out"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def demo(out: pathlib.Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, str(out)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900
    )


def kill_when(out: pathlib.Path, appears: str) -> None:
    """Run the demo until a file or folder is there, then end it without a chance to clean up."""
    process = subprocess.Popen(
        [*COMMAND, str(out)], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 600
        while not (out / appears).exists():
            assert process.poll() is None, f"the demo ended before {appears} was there"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def results(out: pathlib.Path) -> dict:
    """metrics.json without what may differ: times, and the paths that name the run's folder."""
    metrics = json.loads((out / "metrics.json").read_text().replace(out.as_posix(), "OUT"))
    del metrics["phases"]
    return metrics


@pytest.mark.slow
def test_killed_twice_the_demo_ends_as_if_nothing_had_happened(tmp_path):
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

    # a finished run is only reported again: no training, the same page
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*.safetensors")}
    page = (whole / "report.html").read_bytes()
    again = demo(whole)
    assert again.returncode == 0, again.stderr
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*.safetensors")} == before
    assert (whole / "report.html").read_bytes() == page
    for word in ("Reconstruction", "Question answering", "Drawn"):
        assert word in again.stdout

    # other configs in the same folder are refused
    other = tmp_path / "other"
    shutil.copytree(CONFIGS, other)
    text = (other / "tokenizer.yaml").read_text()
    (other / "tokenizer.yaml").write_text(text.replace("steps: 24", "steps: 25"))
    refused = subprocess.run(
        [*COMMAND[:4], "--configs", str(other), "--out", str(whole)], cwd=ROOT, capture_output=True, text=True
    )
    assert refused.returncode == 2 and "differs from tokenizer.yaml" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_a_missing_config_is_named(tmp_path):
    folder = tmp_path / "configs"
    folder.mkdir()
    result = subprocess.run(
        [*COMMAND[:4], "--configs", str(folder), "--out", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and "scenes.yaml does not exist" in result.stderr
    assert result.stderr.count("\n") == 1


def test_two_demos_in_one_folder_are_refused(tmp_path):
    from open_unitok.demo import alone_in
    from open_unitok.errors import UserError

    with alone_in(tmp_path), pytest.raises(UserError, match="Another unitok demo"), alone_in(tmp_path):
        pass
    with alone_in(tmp_path):  # and free again
        pass


def test_shipped_configs_are_valid_and_name_the_home_folder():
    from open_unitok import demo
    from open_unitok.training.run import load
    from open_unitok.training.scene_config import SceneConfig
    from open_unitok.training.scenes import load_config

    for name in demo.CONFIGS:
        text = (ROOT / "configs" / "demo" / name).read_text()
        assert demo.HOME in text
        if name != "scenes.yaml":
            load(str(ROOT / "configs" / "demo" / name), [])
    assert load_config(str(ROOT / "configs" / "demo" / "scenes.yaml")) == SceneConfig()
