"""A run that goes from two ranks to one and back continues its curve: GAN, averages, resets, both splits."""

import json

import pytest

from open_unitok.cli.main import main

from ..two_ranks import MODEL, STEPS, assert_same_weights, launch_jobs, rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

GAN = ["losses.adversarial=0.4"]
GAN += ["discriminator={kind: patch, width: 8, layers: 2, start: 1, warmup: 3, optimizer: {eps: 1.0e-4}}"]
# of the last two steps at each part of the run, records are of two steps
COMMON = [*STEPS, "steps=6", "log.every=2", "checkpoint.keep=9"]
# name -> overrides of the three parts of the run: on two ranks, on one, on two
RUNS = {
    **{f"zero{stage}": [[*GAN, f"engine.zero_stage={stage}"]] * 3 for stage in range(3)},
    "muon": [["optimizer.kind=muon", *GAN]] * 3,
    "mixed": [[*GAN, f"engine.zero_stage={stage}"] for stage in (2, 0, 1)],
    "workers": [[*GAN, "engine.zero_stage=1", "data.workers=2"]] * 3,
}


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Folder of the runs NAME and, of one uninterrupted process, NAME-whole."""
    root, config = tmp_path_factory.mktemp("other_ranks"), str(data / "config.yaml")

    def on_two(part, *stop):
        jobs = [
            {"config": config, "overrides": [*COMMON, *parts[part], f"out={root / name}", *stop]}
            for name, parts in RUNS.items()
        ]
        launch_jobs(jobs, "tokenizer", root)

    on_two(0, "stop_at=3")
    for name, parts in RUNS.items():
        main(["train", config, *COMMON, *parts[1], f"out={root / name}", "stop_at=5"])
    on_two(2)
    for name, parts in RUNS.items():
        main(["train", config, *COMMON, *parts[0], f"out={root / name}-whole"])
    return root


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_then_one_then_two_continue_the_curve(runs, name):
    """Losses of both networks, usage, and the averaged weights that are saved."""
    found, expected = rows(runs / name), rows(runs / f"{name}-whole")
    for one, other in zip(found, expected, strict=True):
        for key in one.keys() - {"lr", "step"}:
            # Muon orthogonalises in bf16
            tolerance = 1e-2 if name == "muon" else 1e-3
            assert one[key] == pytest.approx(other[key], rel=tolerance, abs=1e-4), (one["step"], key)
    if name != "muon":
        assert_same_weights(runs / name / MODEL, runs / f"{name}-whole" / MODEL)


def test_the_moments_and_the_position_matter(data, runs, tmp_path):
    """What the test above would see if a part of the state were lost."""
    steps = sorted((runs / "zero1" / "checkpoints").glob("step-*"))
    assert [path.name for path in steps] == ["step-00000003", "step-00000005", "step-00000006"]
    out = tmp_path / "weights"
    given = [*COMMON, *RUNS["zero1"][1], f"init_from={steps[0]}", "steps=3", f"out={out}", "log.every=1"]
    main(["train", str(data / "config.yaml"), *given])
    whole = json.loads((runs / "zero1-whole" / "metrics.jsonl").read_text().splitlines()[-1])
    assert rows(out)[-1]["loss"] != pytest.approx(whole["loss"], rel=1e-2)
