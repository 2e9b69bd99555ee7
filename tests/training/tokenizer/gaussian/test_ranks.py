"""Gaussians on two ranks: replaced rows, moving averages and the falling scale are those of one process."""

import pytest
import torch
from safetensors.torch import load_file

from open_unitok.cli.main import main

from ...two_ranks import MODEL, assert_resumed_exactly, assert_same_losses, launch_jobs
from .test_gaussian import CONTINUOUS, overrides

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# half of the images are decoded, and reordered for it
STEPS = ["steps=4", "checkpoint.every=4", "log.images_every=0", "reconstruct_share=0.5"]


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A folder with the runs KIND of one process, KIND-ranks, and KIND-ranks-resumed of two."""
    folder, config, jobs = tmp_path_factory.mktemp("ranks"), str(data / "config.yaml"), []
    for kind, changes in (("levels", {}), ("continuous", CONTINUOUS)):
        options = [*overrides(**changes), *STEPS]
        main(["train", config, f"out={folder / kind}", *options])
        for out, stops in (("ranks", [[]]), ("ranks-resumed", [["stop_at=2"], []])):
            for stop in stops:
                jobs.append(
                    {"config": config, "overrides": [f"out={folder / f'{kind}-{out}'}", *options, *stop]}
                )
    launch_jobs(jobs, "tokenizer", folder)
    return folder


@pytest.mark.parametrize("kind", ["levels", "continuous"])
def test_two_ranks_equal_one_process(runs, kind):
    assert_same_losses(runs / kind, runs / f"{kind}-ranks")
    ours, theirs = (load_file(runs / name / MODEL) for name in (kind, f"{kind}-ranks"))
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        # a replaced row is a latent, which rounding in all weights moves; which one it is, is exact
        error = 1e-3 if key.rpartition(".")[2] in ("codebooks", "total") else 1e-4
        error = 0 if key.endswith(".size") else error
        torch.testing.assert_close(tensor.float(), theirs[key].float(), rtol=0, atol=error, msg=key)


@pytest.mark.parametrize("kind", ["levels", "continuous"])
def test_two_ranks_resume_exactly(runs, kind):
    assert_resumed_exactly(runs / f"{kind}-ranks", runs / f"{kind}-ranks-resumed")
