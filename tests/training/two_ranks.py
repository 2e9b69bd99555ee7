"""Runs on two ranks of one machine, and their comparison with one process and with resumed runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from open_unitok.cli.main import main

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
# with the usual eps, gradients that are only rounding errors would change weights by the whole learning rate
STEPS = ("steps=5", "checkpoint.every=5", "log.every=1", "log.images_every=0", "optimizer.eps=1e-4")


def launch(*command: object, timeout: float = 1200) -> None:
    """torchrun of a script or of `-m module` with its arguments."""
    done = subprocess.run(
        [*LAUNCH, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def launch_jobs(jobs: list[dict], worker: str, folder: Path) -> None:
    """One launch of all jobs; worker: "tokenizer" or "mllm", whose `ranks_worker` runs them in turn."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    launch(Path(__file__).parent / worker / "ranks_worker.py", folder / "jobs.json")


def train_all(folder: Path, runs: dict[str, tuple[Path, list[str]]], stop_at: int) -> Path:
    """Trains each run, name -> (config, overrides), four times: NAME and NAME-resumed in one process,
    NAME-ranks and NAME-ranks-resumed on two ranks; the resumed ones stop after `stop_at` steps."""
    launched = []
    for name, (config, options) in runs.items():
        for suffix, stops in (("", [[]]), ("-resumed", [[f"stop_at={stop_at}"], []])):
            for stop in stops:
                main(["train", str(config), f"out={folder / name}{suffix}", *options, *stop])
                ranks = [f"out={folder / name}-ranks{suffix}", *options, *stop]
                launched.append({"config": str(config), "overrides": ranks})
    launch_jobs(launched, "tokenizer", folder)
    return folder


def rows(out: Path) -> list[dict]:
    """The logged metrics without those of speed."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in records]


def assert_same_losses(single: Path, both: Path) -> None:
    for one, two in zip(rows(single), rows(both), strict=True):
        for key in one.keys() - {"lr", "logit_scale", "step"}:
            # a bit of a gradient may be summed in another order
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), (one["step"], key)


def assert_same_weights(single: Path, both: Path) -> None:
    """Of two safetensors files, to the rounding of sums in another order."""
    ours, theirs = load_file(single), load_file(both)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor.float(), theirs[key].float(), rtol=0, atol=1e-4, msg=key)


def assert_equal_files(whole: Path, resumed: Path) -> None:
    """Of two safetensors files, bit for bit."""
    ours, theirs = load_file(whole), load_file(resumed)
    assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours)


MODEL = Path("model", "model.safetensors")


def assert_two_ranks_equal_one_process(runs: Path, name: str, file: Path = MODEL) -> None:
    single, both = runs / name, runs / f"{name}-ranks"
    assert_same_losses(single, both)
    assert_same_weights(single / file, both / file)


def assert_resumed_exactly(whole: Path, resumed: Path, file: Path = MODEL) -> None:
    assert rows(resumed) == rows(whole)
    assert_equal_files(whole / file, resumed / file)
