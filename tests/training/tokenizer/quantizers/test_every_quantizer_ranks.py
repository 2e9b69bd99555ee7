"""Every entry of QUANTIZERS: two ranks give the run of one process, and a stopped run resumes exactly.

All runs on two ranks share one launch.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from open_unitok.cli.main import main
from open_unitok.tokenizer import QUANTIZERS

from ....tokenizer.quantizers.kinds import ENTRIES, INSTALLED, KINDS, entry_of, overrides

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

# with the usual eps, gradients that are only rounding errors would change weights by the whole learning rate
STEPS = ("steps=5", "checkpoint.every=5", "log.every=1", "log.images_every=0", "optimizer.eps=1e-4")


def run_options(name: str) -> list[str]:
    """Overrides of the config of `data`; dead codes are reset where the kind allows it."""
    moves = QUANTIZERS[entry_of(name)].moves_rows
    codebooks = {"init_images": 16, **({} if moves else {"reset_after": 2, "reset_share": 1.0})}
    return [*STEPS, *overrides(name), f"codebooks={json.dumps(KINDS[name].codebooks or codebooks)}"]


def rows(out: Path) -> list[dict]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in records]


def state(out: Path) -> dict:
    return load_file(out / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A folder with the runs NAME and NAME-resumed of one process, and NAME-ranks and NAME-ranks-resumed."""
    folder, config = tmp_path_factory.mktemp("every"), str(data / "config.yaml")
    launched = []
    for name in INSTALLED:
        options = run_options(name)
        for out, stops in ((name, [[]]), (f"{name}-resumed", [["stop_at=2"], []])):
            for stop in stops:
                main(["train", config, f"out={folder / out}", *options, *stop])
                ranks = out.replace(name, f"{name}-ranks")
                launched.append({"config": config, "overrides": [f"out={folder / ranks}", *options, *stop]})
    (folder / "jobs.json").write_text(json.dumps(launched))
    worker = str(Path(__file__).parents[1] / "ranks_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", worker]
    done = subprocess.run(
        [*command, str(folder / "jobs.json")],
        capture_output=True,
        text=True,
        timeout=1200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", ENTRIES)
def test_two_ranks_equal_one_process(runs, name):
    single, both = runs / name, runs / f"{name}-ranks"
    for one, two in zip(rows(single), rows(both), strict=True):
        for key in one.keys() - {"lr", "logit_scale", "step"}:
            # a bit of a gradient may be summed in another order
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), (one["step"], key)
    ours, theirs = state(single), state(both)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor.float(), theirs[key].float(), rtol=0, atol=1e-4, msg=key)


@pytest.mark.parametrize("ranks", ["", "-ranks"])
@pytest.mark.parametrize("name", ENTRIES)
def test_a_stopped_run_resumes_exactly(runs, name, ranks):
    """Losses, weights, and the quantiser's own state: moving averages, frequencies, the started flag."""
    whole, resumed = runs / f"{name}{ranks}", runs / f"{name}{ranks}-resumed"
    assert rows(resumed) == rows(whole)
    ours, theirs = state(whole), state(resumed)
    assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours)
    kept = {key.rpartition(".")[2] for key in ours if key.startswith("quantizer.")}
    assert {"usage", "calls"} <= kept and set(KINDS[name].state) <= kept
