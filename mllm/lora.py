"""LoRA adapters through peft: add them to linear layers, load and merge them."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from open_unitok.core.errors import UserError
from open_unitok.tokenizer.adaptation.lora import ADAPTER_CONFIG, import_peft
from open_unitok.tokenizer.folder_checks import check_finite, loading, read_config, read_header

from .model import UniTokForConditionalGeneration

# name of a LoRA weight -> its module
_LORA = re.compile(r"base_model\.model\.(.+)\.lora_(?:A|embedding_A)(?:\.weight)?")


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
    lora_config = import_peft().LoraConfig
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
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for part in parts:
        inside = [name for name in linear if f"{name}.".startswith(f"{part}.")]
        if not inside:
            raise UserError(f"The model's part {part!r} has no linear layer for LoRA.")
        # `part` may itself be a linear layer ("lm_head"): then it is matched by its own name
        leaves = {_leaf(name[len(part) + 1 :]) for name in inside if name != part}
        inner = "|".join(sorted(map(re.escape, leaves)))
        patterns.append(rf"{re.escape(part)}\.(?:.*\.)?(?:{inner})" if inner else re.escape(part))
    return "|".join(patterns)


def _leaf(name: str) -> str:
    """The last part of a module's name, with the name of its list where it is a number: "outputs.0"."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def merge_adapter(
    model: UniTokForConditionalGeneration, folder: str | os.PathLike[str]
) -> UniTokForConditionalGeneration:
    """The model with the adapter of a folder or hub id merged into its weights.

    Raises:
        UserError: peft is not installed, there is no adapter, or it does not fit the model.
    """
    peft = import_peft()
    path = Path(folder)
    if path.exists() and not (path / ADAPTER_CONFIG).exists():
        hint = f" Did you mean {path / 'model'}?" if (path / "model" / ADAPTER_CONFIG).exists() else ""
        raise UserError(f"{folder} is not an adapter: it has no {ADAPTER_CONFIG}.{hint}")
    config = _checked_config(peft, path, model) if path.exists() else None
    try:
        merged = peft.PeftModel.from_pretrained(model, str(folder), config=config).merge_and_unload()
    except (RuntimeError, ValueError, OSError) as error:
        # peft lists every tensor that differs: two lines are enough
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(
            f"The adapter {folder} does not fit this model{_base(path)}: {' '.join(lines[:2])[:300]}"
        ) from error
    check_finite(merged, f"{folder}, merged")
    return merged


def _checked_config(peft: Any, path: Path, model: nn.Module) -> Any:
    """The config of an adapter folder, compared with the headers of its weights.

    The modules come from the weights: a pattern in a file of somebody else may take for ever to match.

    Raises:
        UserError: a file is broken, or the ranks or modules of config and weights differ.
    """
    description = read_config(path, ADAPTER_CONFIG)
    files = [path / f"adapter_model.{suffix}" for suffix in ("safetensors", "bin")]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        raise UserError(f"{path} has no weights: neither {files[0].name} nor {files[1].name}.")
    stored = read_header(file)
    with loading(path / ADAPTER_CONFIG):
        config = peft.PeftConfig.from_pretrained(str(path))
    if description.get("peft_type") != "LORA":
        return config
    ranks = {m[1]: entry.shape[0] for name, entry in stored.items() if (m := _LORA.fullmatch(name))}
    if not ranks:
        raise UserError(f"{file} has no LoRA weights.")
    if unknown := sorted(ranks.keys() - dict(model.named_modules()).keys()):
        raise UserError(f"The adapter {path} does not fit this model{_base(path)}: it has no {unknown[0]}.")
    patterns = {**(config.rank_pattern or {}), **(config.alpha_pattern or {})}
    if any(re.search(r"[)\]][*+{]|[*+}][*+{]", str(pattern)) for pattern in patterns):
        raise UserError(f"{path / ADAPTER_CONFIG}: rank_pattern and alpha_pattern must not repeat groups.")
    with loading(path / ADAPTER_CONFIG):
        largest = max([config.r, *(config.rank_pattern or {}).values()])
        if largest > max(ranks.values()):
            raise UserError(
                f"{path / ADAPTER_CONFIG}: r = {largest}, but the weights have rank {max(ranks.values())}."
            )
    config.target_modules = set(ranks)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    return config


def _base(path: Path) -> str:
    """ " (it was trained on ...)" if its config has the base model."""
    if not (path / ADAPTER_CONFIG).exists():
        return ""
    base = read_config(path, ADAPTER_CONFIG).get("base_model_name_or_path")
    return f" (it was trained on {base})" if base else ""
