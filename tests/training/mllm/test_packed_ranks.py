"""Packed rows without a mask, and steps of filled rows: resumed = whole, two ranks = one process, and the
losses of a dense mask. All runs on two ranks share one launch."""

import pytest
from safetensors.torch import load_file

from ..two_ranks import assert_resumed_exactly, launch_jobs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# with the usual eps, gradients that are only rounding errors would change weights by the whole learning rate
STEPS = ("steps=6", "optimizer.eps=1e-4", "log.every=2", "checkpoint.every=3", "data.pack_to=100",
         "data.max_length=100")  # fmt: skip
RUNS = {
    "packed": ["attention=varlen"],
    "dense": ["attention=sdpa"],
    "rows": ["attention=varlen", "data.batch_by=rows", "batch_size=4"],
    "rows-recomputed": ["attention=varlen", "data.batch_by=rows", "batch_size=4",
                        "engine.gradient_checkpointing=true"],
}  # fmt: skip
# name on two ranks -> the run of one process, further overrides
RANKS = {
    "packed0": ("packed", []),
    "packed3": ("packed", ["engine.zero_stage=3"]),
    "rows0": ("rows", ["engine.accumulation=2"]),
    "rows3": ("rows-recomputed", ["engine.zero_stage=3", "data.workers=1"]),
}


@pytest.fixture(scope="module")
def single(mllm):
    return {name: mllm.train(f"packed-{name}", *STEPS, *given) for name, given in RUNS.items()}


@pytest.fixture(scope="module")
def launched(mllm):
    root = mllm.folder / "packed_ranks"
    root.mkdir()
    jobs = [
        {
            "config": str(mllm.folder / "config.yaml"),
            "overrides": [*STEPS, *RUNS[name], *given, f"out={root / both}"],
        }
        for both, (name, given) in RANKS.items()
    ]
    launch_jobs(jobs, "mllm", root)
    return root


def assert_same(mllm, folder, expected):
    mllm.same_rows(mllm.rows(folder), mllm.rows(expected), 1e-4)
    one, other = (load_file(path / "model" / "model.safetensors") for path in (folder, expected))
    assert one.keys() == other.keys()
    worst = max((one[key] - other[key]).abs().max().item() for key in one)
    assert worst < 2e-5, worst


@pytest.mark.parametrize("both", RANKS)
def test_two_ranks_equal_one_process(mllm, launched, single, both):
    assert_same(mllm, launched / both, single[RANKS[both][0]])


def test_training_equals_that_with_a_dense_mask(mllm, single):
    assert_same(mllm, single["packed"], single["dense"])
    assert_same(mllm, single["rows"], single["rows-recomputed"])


@pytest.mark.parametrize("name", ["packed", "rows"])
def test_resume_is_exact(mllm, single, name):
    out = f"packed-resumed-{name}"
    mllm.train(out, *STEPS, *RUNS[name], "stop_at=3")
    assert_resumed_exactly(single[name], mllm.train(out, *STEPS, *RUNS[name]))
