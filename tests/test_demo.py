"""The demo from end to end with configs of seconds: it goes on after a kill, and errors are one line."""

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

from open_unitok.core.errors import UserError
from open_unitok.eval.judges.scenes_detector import ScenesDetector, same_scene
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.images import to_pil

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

    # codes by lot are an image, but not the scene that was asked for
    unitok = UniTok.from_pretrained(whole / "tokenizer" / "model")
    detect = ScenesDetector.from_file(whole / "data")
    scenes = [row["scene"] for row in json.loads((whole / "data" / "test" / "captions.json").read_text())]
    shape = (len(scenes), unitok.config.num_visual_tokens, unitok.config.num_codebooks)
    codes = torch.randint(unitok.config.codebook_size, shape, generator=torch.Generator().manual_seed(0))
    drawn = [np.asarray(to_pil(pixels)) for pixels in unitok.decode(codes).detach()]
    assert np.mean([same_scene(*pair) for pair in zip(detect(drawn), scenes)]) <= 0.05

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
def test_mistakes_stop_before_anything_is_made(tmp_path, capsys, config, change, out, words):
    from open_unitok.cli.main import main

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


def test_a_config_may_change_until_its_phase_has_begun(tmp_path):
    from open_unitok.core.errors import UserError
    from open_unitok.demo import Timings, read_configs, write_configs

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
    begun = configs / "tokenizer.yaml"
    begun.write_text(begun.read_text().replace("steps: 24", "steps: 25"))
    with pytest.raises(UserError, match=r"differs from tokenizer\.yaml"):
        write_configs(out, read_configs(out, str(configs)), Timings(out / "phases.json"))
    assert "steps: 25" in (out / "configs" / "finetune.yaml").read_text()  # nothing was written


def test_seconds_until_a_kill_are_counted(tmp_path):
    from open_unitok.demo import Timings

    path = tmp_path / "phases.json"
    with Timings(path, every=0.02).phase("tokenizer"):
        deadline = time.monotonic() + 30
        while json.loads(path.read_text())[0]["seconds"] < 0.1:  # what a kill here would leave
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert not Timings(path).finished("tokenizer")
    timings = Timings(path)
    before = timings.rows[0]["seconds"]
    with timings.phase("tokenizer"):
        pass
    row = Timings(path).rows[0]
    assert row["calls"] == 2 and row["finished"] and row["seconds"] >= before


def test_two_demos_in_one_folder_are_refused(tmp_path):
    from open_unitok.core.errors import UserError
    from open_unitok.demo import alone_in

    with alone_in(tmp_path), pytest.raises(UserError, match="Another unitok demo"), alone_in(tmp_path):
        pass
    with alone_in(tmp_path):  # and free again
        pass


@pytest.mark.parametrize("run", ["demo", "scenes"])
def test_shipped_configs_are_valid_and_lie_in_one_home_that_out_replaces(run):
    from open_unitok import demo

    folder, home = ROOT / "configs" / run, f"runs/{run}"
    texts = demo.read_configs(pathlib.Path("elsewhere"), str(folder))
    for name, text in texts.items():
        assert home in (folder / name).read_text() and home not in text and "elsewhere/" in text


def test_configs_without_a_home_are_refused(tmp_path):
    from open_unitok import demo

    shutil.copytree(CONFIGS, tmp_path / "configs")
    path = tmp_path / "configs" / "tokenizer.yaml"
    path.write_text(path.read_text().replace("out: runs/demo/tokenizer", "out: tokenizer"))
    with pytest.raises(UserError, match="out is tokenizer; it must lie in a folder"):
        demo.read_configs(tmp_path / "run", str(tmp_path / "configs"))


def test_the_demos_scenes_are_the_default_ones():
    from open_unitok.training.scenes.config import SceneConfig
    from open_unitok.training.scenes.dataset import load_config

    assert load_config(str(ROOT / "configs" / "demo" / "scenes.yaml")) == SceneConfig()
