"""Runs of both stages that save in the background: the same files as without it, and they resume exactly."""

import json

import pytest
import torch
from safetensors.torch import load_file

from open_unitok.cli.main import main
from open_unitok.training.core.checkpoint import Checkpoints

from ..two_ranks import launch_jobs, rows

ON = "checkpoint.background=true"


def same_checkpoints(one, other):
    """The same files, and the same values in them."""
    names = [
        sorted(f.relative_to(path).as_posix() for f in path.rglob("*") if f.is_file())
        for path in (one, other)
    ]
    assert names[0] == names[1] and len(names[0]) > 6
    for name in names[0]:
        if name.endswith(".safetensors"):
            ours, theirs = load_file(one / name), load_file(other / name)
        elif name.endswith(".pt"):
            ours, theirs = (torch.load(path / name, weights_only=False) for path in (one, other))
        else:
            continue
        assert_same(ours, theirs, name)


def assert_same(one, other, where):
    if isinstance(one, torch.Tensor):
        assert one.equal(other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one.keys() - {"log", "ds_config"}:  # times, paths
            assert_same(one[key], other[key], f"{where}:{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for a, b in zip(one, other):
            assert_same(a, b, where)
    elif isinstance(one, int | float | str | bool | None):
        assert one == other, where


def compare(plain, background):
    assert rows(plain) == rows(background)
    steps = Checkpoints(plain / "checkpoints").steps()
    assert steps.keys() == Checkpoints(background / "checkpoints").steps().keys() and len(steps) == 2
    for path in steps.values():
        same_checkpoints(path, background / "checkpoints" / path.name)


@pytest.mark.parametrize("stage", [0, 2])
def test_an_mllm_run_writes_the_same_checkpoints(mllm, stage):
    options = [f"engine.zero_stage={stage}", "steps=3", "checkpoint.every=2"]
    plain = mllm.train(f"plain{stage}", *options)
    background = mllm.train(f"background{stage}", *options, ON, "stop_at=2")
    mllm.train(f"background{stage}", *options, ON)
    compare(plain, background)


def test_a_tokenizer_run_writes_the_same_checkpoints(data, tmp_path):
    """With averaged weights, which are in the model's place while they are written."""
    options = ["steps=3", "checkpoint.every=2", "losses.adversarial=0.4"]
    options.append("discriminator={kind: patch, width: 8, layers: 1, start: 1}")
    for name, more in (("plain", []), ("background", [ON])):
        main(["train", str(data / "config.yaml"), f"out={tmp_path / name}", *options, *more])
    compare(tmp_path / "plain", tmp_path / "background")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_write_the_same_checkpoints(mllm, tmp_path, stage):
    config = str(mllm.folder / "config.yaml")
    options = [f"engine.zero_stage={stage}", "steps=3", "checkpoint.every=2"]
    runs = {
        "plain": [options],
        "background": [[*options, ON, "stop_at=2"], [*options, ON]],
    }
    jobs = [
        {"config": config, "overrides": [*given, f"out={tmp_path / name}"]}
        for name, calls in runs.items()
        for given in calls
    ]
    launch_jobs(jobs, "mllm", tmp_path)
    compare(tmp_path / "plain", tmp_path / "background")
    manifest = tmp_path / "background" / "checkpoints" / "step-00000003" / "training_state" / "manifest.json"
    files = json.loads(manifest.read_text())["files"]
    assert {f"training_state/rank-{rank:05d}.pt" for rank in range(2)} <= files.keys()
