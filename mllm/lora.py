"""LoRA adapters by peft: which layers they sit on, and how they are put on, loaded and merged."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from open_unitok.core.errors import UserError
from open_unitok.core.files import read_json

from .model import UniTokForConditionalGeneration

ADAPTER_CONFIG = "adapter_config.json"


def add_lora(
    model: UniTokForConditionalGeneration,
    parts: Sequence[str],
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
) -> None:
    """Put LoRA on every linear layer of some parts, in place; all other weights are frozen.

    Afterwards `model.save_pretrained` writes the adapter alone.

    Args:
        parts: beginnings of module names, such as "language_model" or "depth_head".

    Raises:
        UserError: peft is not installed, or a part has no linear layer.
    """
    lora_config = _peft().LoraConfig
    model.add_adapter(
        lora_config(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=linear_layers(model, parts)
        )
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def linear_layers(model: nn.Module, parts: Sequence[str]) -> str:
    """A regular expression for the full names of all linear layers of `parts`.

    Raises:
        UserError: a part has none.
    """
    patterns = []
    # "qkv" is read by its attention as a plain matrix: an adapter on it would do nothing
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith("qkv")]
    for part in parts:
        inside = (name for name in linear if f"{name}.".startswith(f"{part}."))
        leaves = {name.rpartition(".")[2] for name in inside}
        if not leaves:
            raise UserError(f"The model's part {part!r} has no linear layer that LoRA could sit on.")
        alone = part.rpartition(".")[2]
        inner = "|".join(sorted(map(re.escape, leaves - {alone})))
        patterns.append(rf"{re.escape(part)}\.(?:.*\.)?(?:{inner})" if inner else re.escape(part))
    return "|".join(patterns)


def merge_adapter(
    model: UniTokForConditionalGeneration, folder: str | os.PathLike[str]
) -> UniTokForConditionalGeneration:
    """The model with the adapter of a folder or hub id added into its weights: as fast as without.

    Raises:
        UserError: peft is not installed, there is no adapter, or it belongs to a model of other sizes.
    """
    peft = _peft()
    path = Path(folder)
    if path.exists() and not (path / ADAPTER_CONFIG).exists():
        hint = f" Is {path / 'model'} meant?" if (path / "model" / ADAPTER_CONFIG).exists() else ""
        raise UserError(f"{folder} holds no adapter: it has no {ADAPTER_CONFIG}.{hint}")
    try:
        return peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except (RuntimeError, ValueError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(
            f"The adapter {folder} does not fit this model{_base(path)}: {' '.join(lines[:2])}"
        ) from error


def _base(path: Path) -> str:
    """ " (it was trained on ...)", where its config says so."""
    if not (path / ADAPTER_CONFIG).exists():
        return ""
    base = read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path")
    return f" (it was trained on {base})" if base else ""


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError(f"Adapters need peft ({error}): pip install 'open-unitok[train]'.") from error
    return peft
