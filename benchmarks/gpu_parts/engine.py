"""Correctness: `unitok train` by DeepSpeed on one device at every ZeRO stage, resumed bit for bit."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from open_unitok.cli.main import run as unitok

from .data import write_tar
from .report import Report

STEPS, STOP = 2, 1
MLLM = {
    "stage": "mllm",
    "steps": STEPS,
    "batch_size": 4,
    "init_from": "scenes",
    "data": {"max_length": 256, "pack_to": 128},
    "optimizer": {"lr": 1e-3, "clip_grad": 1.0},
    "checkpoint": {"every": STOP},
    "log": {"every": 1},
}
KINDS = {"text_to_image": 0.5, "captioning": 0.25, "conversation": 0.25}
TOKENIZER = {
    "stage": "tokenizer",
    "steps": STEPS,
    "batch_size": 4,
    "init_from": "scenes",
    "losses": {"lpips": 0.0, "clip": 0.0},
    "optimizer": {"lr": 1e-4},
    "checkpoint": {"every": STOP},
    "log": {"every": 1},
}
# stage, ZeRO stage, dtype, further overrides; fp32 with attention: auto must not choose flash attention
CASES: dict[str, tuple[str, int, str, tuple[str, ...]]] = {
    **{f"mllm, ZeRO {stage}, bf16": ("mllm", stage, "bf16", ()) for stage in (2, 3, 0, 1)},
    "mllm, ZeRO 2, fp32, attention: auto": ("mllm", 2, "fp32", ("attention=auto",)),
    "mllm, ZeRO 2, bf16, checkpointing": ("mllm", 2, "bf16", ("engine.gradient_checkpointing=true",)),
    **{f"tokenizer, ZeRO {stage}, bf16": ("tokenizer", stage, "bf16", ()) for stage in (1, 0, 2)},
}
# at toy sizes the others run once, without a stop
RESUMED_IN_TOY = ("mllm, ZeRO 3, bf16", "mllm, ZeRO 2, fp32, attention: auto", "tokenizer, ZeRO 1, bf16")


def run(report: Report) -> None:
    """A row per case: losses, and whether the resumed run equals the uninterrupted one."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if not report.row("data", write_data, report, root):
            return
        for name, case in CASES.items():
            resumed = not report.toy or name in RESUMED_IN_TOY
            report.row(name, measure, root / name.replace(" ", "_"), root, resumed, *case, need=12.0)


def write_data(report: Report, root: Path) -> dict[str, Any]:
    """A shard of images, its codes by the shipped tokenizer, and a config per stage."""
    write_tar(root / "images.tar", 16, 64)
    unitok(["extract-codes", "--tokenizer", "scenes", "--data", str(root / "images.tar"),
            "--out", str(root / "codes"), "--device", report.device])  # fmt: skip
    mixture = [{"kind": k, "path": str(root / "codes"), "weight": share} for k, share in KINDS.items()]
    mllm = {**MLLM, "data": {**MLLM["data"], "mixture": mixture}}
    tokenizer = {**TOKENIZER, "data": {"sources": [{"path": str(root / "images.tar")}], "shuffle": 8}}
    for config in (mllm, tokenizer):
        (root / f"{config['stage']}.yaml").write_text(
            yaml.safe_dump({**config, "out": str(root / "unnamed")})
        )
    return {"images": 16}


def measure(
    out: Path, root: Path, resumed: bool, stage: str, zero: int, dtype: str, more: tuple[str, ...]
) -> dict[str, Any]:
    """Train at once and, if `resumed`, again with a stop and a resume, into two run directories.

    Raises:
        RuntimeError: the weights or losses of the two differ.
    """
    given = (f"engine.zero_stage={zero}", f"engine.dtype={dtype}", *more)
    whole = train(out / "whole", root / f"{stage}.yaml", *given, f"checkpoint.every={STEPS}")
    if not resumed:
        return {"loss": whole[0], "resumed": "not at toy sizes", "weights": len(whole[1])}
    train(out / "parts", root / f"{stage}.yaml", *given, f"stop_at={STOP}")
    parts = train(out / "parts", root / f"{stage}.yaml", *given)
    names = whole[1].keys() | parts[1].keys()
    unequal = [name for name in sorted(names) if not torch.equal(whole[1][name], parts[1][name])]
    if unequal or whole[0] != parts[0]:
        raise RuntimeError(f"resumed and uninterrupted differ: {unequal[:3]}, losses {whole[0]} {parts[0]}")
    return {"loss": whole[0], "resumed": "bit for bit", "weights": len(names)}


def train(out: Path, config: Path, *overrides: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Run `unitok train`; the losses so far and the weights, if the run has ended."""
    unitok(["train", str(config), f"out={out}", *overrides])
    lines = (out / "metrics.jsonl").read_text().splitlines()
    weights = out / "model" / "model.safetensors"
    return [json.loads(line)["loss"] for line in lines], load_file(weights) if weights.exists() else {}
