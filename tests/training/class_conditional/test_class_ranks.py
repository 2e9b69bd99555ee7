"""Two ranks on one machine: every ZeRO stage gives the losses and weights of one process, and resumes."""

import pytest
import torch

from ..two_ranks import launch_jobs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STAGES = (0, 1, 2, 3)
# with the usual eps, gradients that are only rounding errors would change weights by the whole learning rate
STEPS = ("steps=6", "optimizer.eps=1e-4", "checkpoint.every=2")


@pytest.fixture(scope="module")
def launched(classes):
    """All runs on two ranks; those named resumed-* were stopped after step 3 and resumed."""
    root, jobs = classes.folder / "ranks", []
    for stage in STAGES:
        for name, stops in ((f"zero{stage}", ([],)), (f"resumed{stage}", (["stop_at=3"], []))):
            own = [*STEPS, f"engine.zero_stage={stage}", f"out={root / name}"]
            jobs += [
                {"config": str(classes.folder / "config.yaml"), "overrides": [*own, *stop]} for stop in stops
            ]
    root.mkdir()
    launch_jobs(jobs, "mllm", root)
    return root


@pytest.fixture(scope="module")
def single(classes):
    return classes.train("single", *STEPS)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["zero", "resumed"])
def test_two_ranks_equal_one_process(classes, launched, single, name, stage):
    run = launched / f"{name}{stage}"
    for one, other in zip(classes.rows(run), classes.rows(single), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    weights = classes.weights(run)
    for name, expected in classes.weights(single).items():
        torch.testing.assert_close(weights[name], expected, atol=1e-5, rtol=1e-4)
