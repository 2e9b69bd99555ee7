"""LoRA adapters through peft: add them to linear layers, load and merge them."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from open_unitok.core.errors import UserError
from open_unitok.core.text_files import read_json

from .model import UniTokForConditionalGeneration

ADAPTER_CONFIG = "adapter_config.json"


def add_lora(
    model: UniTokForConditionalGeneration,
    parts: Sequence[str],
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
) -> None:
    """Add LoRA to every linear layer of some parts, in place; all other weights are frozen.

    `model.save_pretrained` then writes the adapter only.

    Args:
        parts: prefixes of module names, such as "language_model" or "depth_head".

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
    """A regular expression that matches the full names of all linear layers of `parts`.

    Raises:
        UserError: a part has none.
    """
    patterns = []
    # ProjectionAttention reads `qkv.weight` without calling the layer: an adapter on it would have no effect
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith("qkv")]
    for part in parts:
        inside = (name for name in linear if f"{name}.".startswith(f"{part}."))
        leaves = {name.rpartition(".")[2] for name in inside}
        if not leaves:
            raise UserError(f"The model's part {part!r} has no linear layer for LoRA.")
        # `part` may itself be a linear layer ("lm_head"): then it is matched by its own name
        alone = part.rpartition(".")[2]
        inner = "|".join(sorted(map(re.escape, leaves - {alone})))
        patterns.append(rf"{re.escape(part)}\.(?:.*\.)?(?:{inner})" if inner else re.escape(part))
    return "|".join(patterns)


def merge_adapter(
    model: UniTokForConditionalGeneration, folder: str | os.PathLike[str]
) -> UniTokForConditionalGeneration:
    """The model with the adapter of a folder or hub id merged into its weights.

    Raises:
        UserError: peft is not installed, there is no adapter, or it does not fit the model.
    """
    peft = _peft()
    path = Path(folder)
    if path.exists() and not (path / ADAPTER_CONFIG).exists():
        hint = f" Did you mean {path / 'model'}?" if (path / "model" / ADAPTER_CONFIG).exists() else ""
        raise UserError(f"{folder} is not an adapter: it has no {ADAPTER_CONFIG}.{hint}")
    try:
        return peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except (RuntimeError, ValueError, OSError) as error:
        # peft lists every tensor that differs: two lines are enough
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(
            f"The adapter {folder} does not fit this model{_base(path)}: {' '.join(lines[:2])}"
        ) from error


def _base(path: Path) -> str:
    """ " (it was trained on ...)" if its config has the base model."""
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
