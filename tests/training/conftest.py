"""The golden values of the losses, and the small DINOv2, discriminator and LPIPS they were made with."""

import json

import pytest
import torch
from safetensors.torch import load_file

from open_unitok.tokenizer.lpips import LPIPS
from open_unitok.training.dino import Dino
from open_unitok.training.discriminator import DinoDiscriminator

SEED = 20250


@pytest.fixture(scope="session")
def values(golden):
    """The golden tensors; clone before changing one."""
    return load_file(golden / "losses" / "losses.outputs.safetensors")


@pytest.fixture(scope="session")
def numbers(golden):
    """The golden numbers."""
    return json.loads((golden / "losses" / "losses.meta.json").read_text())


@pytest.fixture
def small_dino(formula):
    """() -> a fresh DINOv2 of the golden files: 98 pixels natively, width 64, 4 blocks."""

    def build() -> Dino:
        dino = Dino(width=64, depth=4, heads=2, patch=14, grid=7)
        dino.load_state_dict({n: formula(f"dino.{n}", t.shape, SEED) for n, t in dino.state_dict().items()})
        return dino

    return build


@pytest.fixture
def small_discriminator(small_dino, formula):
    """(**options) -> a fresh discriminator of the golden files."""

    def build(**options) -> DinoDiscriminator:
        model = DinoDiscriminator(small_dino(), depths=(0, 1, 3), **options)
        if not options:
            heads = {
                n: formula(f"disc.heads.{n}", t.shape, SEED) for n, t in model.heads.state_dict().items()
            }
            model.heads.load_state_dict(heads)
        return model

    return build


@pytest.fixture(scope="session")
def lpips(formula):
    """LPIPS with the golden weights."""
    model = LPIPS()
    model.load_state_dict({n: formula(f"lpips.{n}", t.shape, SEED) for n, t in model.state_dict().items()})
    return model


@pytest.fixture
def recorded_look(values):
    """(step, number) -> the draws of that call of DiffAug in the golden training steps."""

    def pick(step: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        return values[f"train.step{step}.rand{2 * number}"], values[f"train.step{step}.rand{2 * number + 1}"]

    return pick
