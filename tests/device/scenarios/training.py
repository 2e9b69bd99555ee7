"""Training steps of both stages through `unitok train` with DeepSpeed, in bf16."""

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from emulated_cuda import LOG

from open_unitok.cli import train as train_command
from open_unitok.tokenizer.frozen.lpips import LPIPS
from open_unitok.training.mllm import train as mllm_train
from open_unitok.training.tokenizer import train as tokenizer_train

from .parts import TESTS, Folders, load_conftest, planted

conftest = load_conftest("training")


@contextlib.contextmanager
def _measured(module: Any) -> Iterator[list[dict]]:
    """What the device counted in each optimiser step of a training loop."""
    reports, original = [], module.train_step

    def step(*args: Any, **kwargs: Any) -> Any:
        LOG.clear()
        found = original(*args, **kwargs)
        reports.append(LOG.report())
        return found

    with planted(module, "train_step", step):
        yield reports


def train_measured(module: Any, config: Path, out: str, *overrides: str) -> dict:
    """Run `unitok train`; what the last step counted, the waits of each step, and the run's losses."""
    folder = Path(tempfile.mkdtemp()) / out
    with _measured(module) as reports:
        given = [f"out={folder}", "engine.dtype=bf16", *overrides]
        train_command.run(argparse.Namespace(config=str(config), overrides=given))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = {
        name: [row[name] for row in rows] for name in rows[-1] if not name.endswith(("seconds", "second"))
    }
    return {**reports[-1], "waits_by_step": [report["waits"] for report in reports], "metrics": kept}


def scenario_tokenizer() -> dict:
    """Every loss: LPIPS, DINO discriminator with augmentations and adaptive weight, entropy, CLIP; dead
    codes, EMA, drop path and checkpointing."""
    folders = Folders()
    config = conftest.data.__wrapped__(folders) / "config.yaml"
    dino = conftest.dino_file.__wrapped__(folders)
    torch.manual_seed(0)
    with planted(LPIPS, "from_file", lambda *args: LPIPS()):
        return train_measured(
            tokenizer_train,
            config,
            "tokenizer",
            "steps=4",
            "model.image_size=48",
            "losses={lpips: 1.0, lpips_weights: random, adversarial: 0.4, entropy: 0.1}",
            f"discriminator={{weights: {dino}}}",
            "codebooks={init_images: 16, reset_after: 1, reset_share: 0.5}",
            "reconstruct_share=0.5",
            "engine.gradient_checkpointing=true",
            "log.images_every=0",
        )


def scenario_mllm() -> dict:
    """Packed and padded rows, LoRA, checkpointing, other kinds of attention, ZeRO 3."""
    root = conftest.mllm_folder.__wrapped__(Folders(), TESTS / "golden")
    cases = {
        "packed, checkpointing": ["data.pack_to=100", "engine.gradient_checkpointing=true"],
        "packed, sdpa": ["data.pack_to=100", "attention=sdpa"],
        "packed, eager": ["data.pack_to=100", "attention=eager"],
        "padded": [],
        "padded, ZeRO 3": ["engine.zero_stage=3"],
    }
    common = ("steps=3", "log.every=3")
    return {
        name: train_measured(mllm_train, root / "config.yaml", "run", *common, *case)
        for name, case in cases.items()
    }


def scenario_mllm_lora() -> dict:
    """A trained model, fine-tuned by LoRA with dropout on a base in bf16."""
    root = conftest.mllm_folder.__wrapped__(Folders(), TESTS / "golden")
    base = conftest.train(root, "base", "steps=1")
    lora = "lora={rank: 2, alpha: 4, dropout: 0.1, base: bf16}"
    config = root / "config.yaml"
    given = (f"init_from={base}/model", "model=null", lora, "steps=3", "log.every=3", "data.pack_to=100")
    return train_measured(mllm_train, config, "lora", *given)
