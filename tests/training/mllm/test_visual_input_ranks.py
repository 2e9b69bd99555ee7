"""Dual and continuous input on two ranks: every ZeRO stage gives the losses and weights of one process."""

import json

import pytest
from safetensors.torch import load_file

from ..two_ranks import launch_jobs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# with the usual eps, gradients that are only rounding errors would change weights by the whole learning rate
STEPS = ("steps=6", "optimizer.eps=1e-4")
LATENTS = 'model.fields={"visual_input": "dual", "features": {"source": "latents"}}'
QUANTISED = 'model.fields={"visual_input": "continuous", "features": {"source": "quantised"}}'


@pytest.fixture(scope="module")
def jobs(mllm):
    """Name of the run -> overrides; `apart` has a text on one rank and an image that is read on the other."""
    path = mllm.write_codes(mllm.folder, "codes_ranks", range(16), 2, "--features", "latents")
    kinds = (("text_to_image", path), ("captioning", path), ("conversation", path))
    entries = [{"kind": kind, "path": codes} for kind, codes in kinds]
    text = {"kind": "text", "path": str(mllm.folder / "text.txt")}
    mixture = f"data.mixture={json.dumps([*entries, text])}"
    halves = f"data.mixture={json.dumps([text, entries[1]])}"
    found = {f"dual{stage}": [*STEPS, mixture, LATENTS, f"engine.zero_stage={stage}"] for stage in range(4)}
    found["quantised3"] = [*STEPS, mixture, QUANTISED, "engine.zero_stage=3"]
    found["apart"] = [*STEPS, halves, LATENTS, "engine.zero_stage=3", "batch_size=2"]
    return found


@pytest.fixture(scope="module")
def launched(mllm, jobs):
    root = mllm.folder / "visual_ranks"
    root.mkdir()
    config = str(mllm.folder / "config.yaml")
    listed = [{"config": config, "overrides": [*o, f"out={root / name}"]} for name, o in jobs.items()]
    launch_jobs(listed, "mllm", root)
    return root


@pytest.mark.parametrize("name", ["dual0", "dual1", "dual2", "dual3", "quantised3", "apart"])
def test_two_ranks_equal_one_process(mllm, jobs, launched, name):
    plain = [override for override in jobs[name] if "zero_stage" not in override]
    one = mllm.folder / ("visual_one_dual" if name.startswith("dual") else f"visual_one_{name}")
    if not one.exists():
        mllm.train(one.name, *plain)
    mllm.same_rows(mllm.rows(launched / name), mllm.rows(one), 1e-4)
    first, second = (load_file(run / "model" / "model.safetensors") for run in (launched / name, one))
    assert first.keys() == second.keys()
    worst = max((first[key] - second[key]).abs().max().item() for key in first)
    assert worst < 2e-5, worst
