"""Depth heads and input embedders of other systems, and added place vectors, on two ranks: every ZeRO stage
gives the losses and weights of one process. All runs share one launch."""

import pytest
from safetensors.torch import load_file

from ..two_ranks import launch_jobs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

STAGES = (0, 1, 2, 3)
# with the usual eps, gradients that are only rounding errors would change weights by the whole learning rate
STEPS = ("steps=4", "optimizer.eps=1e-4", "log.every=2")
FQGAN = "{rotary: grid, tables: shared, outputs: own, output_bias: false, context: raw}"
VARIANTS = ("fqgan", "mlp", "places")


@pytest.fixture(scope="module")
def options(mllm_reference):
    """name -> overrides"""
    trained = f"init_from={mllm_reference / 'model'}"
    return {
        "fqgan": [f"model.fields={{input_embedder: tables, depth_options: {FQGAN}}}"],
        "mlp": ["model.fields={input_embedder: mlp, depth_options: {rotary: none}}"],
        "places": ["model=null", trained, "visual_positions=learned_2d"],
    }


@pytest.fixture(scope="module")
def launched(mllm, options):
    """All runs on two ranks."""
    root = mllm.folder / "variants"
    root.mkdir()
    jobs = [
        {
            "config": str(mllm.folder / "config.yaml"),
            "overrides": [*STEPS, *given, f"engine.zero_stage={stage}", f"out={root / f'{name}{stage}'}"],
        }
        for name, given in options.items()
        for stage in STAGES
    ]
    launch_jobs(jobs, "mllm", root)
    return root


@pytest.fixture(scope="module")
def single(mllm, options):
    """name -> the same run in one process."""
    return {
        name: mllm.train(f"single-{name}", *STEPS, "checkpoint.every=2", *given)
        for name, given in options.items()
    }


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_stage_equals_one_process(mllm, launched, single, name, stage):
    folder = launched / f"{name}{stage}"
    mllm.same_rows(mllm.rows(folder), mllm.rows(single[name]), 1e-4)
    one, other = (load_file(path / "model" / "model.safetensors") for path in (folder, single[name]))
    assert one.keys() == other.keys()
    worst = max((one[key] - other[key]).abs().max().item() for key in one)
    assert worst < 2e-5, worst


@pytest.mark.parametrize("name", VARIANTS)
def test_resume_is_exact(mllm, single, options, name):
    out = f"resumed-{name}"
    for stop in (["stop_at=2"], []):
        folder = mllm.train(out, *STEPS, "checkpoint.every=2", *options[name], *stop)
    assert mllm.rows(folder) == mllm.rows(single[name])
    a, b = mllm.weights(folder), mllm.weights(single[name])
    assert all(a[key].equal(b[key]) for key in a)
