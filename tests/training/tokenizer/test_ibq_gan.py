"""IBQ's GAN: half the hinge loss, LeCam with running means, the non-saturating generator loss."""

import json

import pytest
import torch
from safetensors.torch import load_file

from open_unitok.cli.main import main
from open_unitok.training.tokenizer.losses import GAN_LOSSES, GENERATOR_LOSSES, LeCam

from ..two_ranks import launch

OPTIONS = "loss: hinge_half, generator: nonsaturating, lecam: 0.05, adaptive: null, consistency: 0.0"
SETTINGS = [
    "losses.adversarial=0.1",
    f"discriminator={{kind: patch, width: 8, layers: 2, start: 1, {OPTIONS}}}",
]
SETTINGS += ["steps=5", "log.images_every=0"]


def near(found, expected):
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * scale)


def test_golden_steps(golden):
    folder = golden / "quantizers"
    tensors = load_file(folder / "ibq.safetensors")
    case = json.loads((folder / "ibq.meta.json").read_text())["cases"]["adversarial"]
    lecam, hinge = LeCam(case["settings"]["decay"]), GAN_LOSSES["hinge_half"]
    for step in range(case["settings"]["steps"]):
        start = f"adversarial.{step}"
        real, fake = (tensors[f"{start}.{name}"].clone().requires_grad_() for name in ("real", "fake"))
        found = {"hinge": hinge(real) + hinge(-fake), "lecam": lecam(real, fake)}
        found["discriminator"] = found["hinge"] + case["settings"]["lecam_weight"] * found["lecam"]
        found["discriminator"].backward()
        near(real.grad, tensors[f"{start}.grad_real.discriminator"])
        near(fake.grad, tensors[f"{start}.grad_fake.discriminator"])
        fake.grad = None
        found["generator"] = GENERATOR_LOSSES["nonsaturating"](fake)
        found["generator"].backward()
        near(fake.grad, tensors[f"{start}.grad_fake.generator"])
        found |= {"running_real": torch.tensor(lecam.real), "running_fake": torch.tensor(lecam.fake)}
        for name, value in found.items():
            expected = case["scalars"][f"{step}.{name}"]["float64"]
            assert value.item() == pytest.approx(expected, rel=1e-5, abs=5e-6), (step, name)


def rows(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]


def test_running_means_are_resumed(data, tmp_path):
    def train(out, *more):
        main(["train", str(data / "config.yaml"), f"out={out}", *SETTINGS, *more])

    train(tmp_path / "whole")
    train(tmp_path / "run", "stop_at=3")
    train(tmp_path / "run")
    found = rows(tmp_path / "run")
    assert found == rows(tmp_path / "whole")
    assert found[0]["lecam"] == 0 and all(row["lecam"] > 0 for row in found[1:])
    assert found[-1]["adversarial_weight"] == pytest.approx(0.1)  # fixed


@pytest.mark.slow
def test_two_ranks_equal_one_process(data, tmp_path):
    main(["train", str(data / "config.yaml"), f"out={tmp_path / 'single'}", *SETTINGS])
    launch("-m", "open_unitok", "train", data / "config.yaml", f"out={tmp_path / 'both'}", *SETTINGS)
    for one, two in zip(rows(tmp_path / "single"), rows(tmp_path / "both"), strict=True):
        for name in ("loss", "adversarial", "discriminator", "lecam", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), (one["step"], name)
