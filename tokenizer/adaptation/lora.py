"""LoRA on the layers of a trained encoder and decoder (CODA, arXiv 2503.17760; LoRA, 2106.09685), by peft.

I and O inputs and outputs of a layer, r rank. A convolution conv(x) becomes conv(x) + up(down(x)): `down` has
its kernel, stride and padding and r outputs, `up` is 1x1. The factor alpha / r is 1, and `up` starts at zero.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from open_unitok.core.errors import UserError

from ..folder_checks import loading

PARTS = ("encoder", "decoder")
ADAPTER_FOLDER = "adapter"  # in a model folder
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names
_PREFIX = "base_model.model."  # of peft's keys


def inject_lora(model: nn.Module, names: Sequence[str], rank: int) -> list[str]:
    """Add LoRA, in place, to convolutions and linear layers of encoder and decoder; freeze all other weights.

    Chosen are the layers whose full name contains one of `names`, as published, but for grouped convolutions.
    The start is from torch's global generator.

    Returns:
        The names of these layers.

    Raises:
        UserError: peft is not installed; no layer has such a name; a chosen convolution is grouped.
    """
    chosen = find_layers(model, names)
    peft = import_peft()
    # the mean of r products of two such factors keeps the scale; alpha = rank: no other factor
    options = peft.LoraConfig(
        r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=chosen, lora_dropout=0.0
    )
    peft.inject_adapter_in_model(options, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    return chosen


def find_layers(model: nn.Module, names: Sequence[str]) -> list[str]:
    """See `inject_lora`."""
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if name.partition(".")[0] in PARTS and isinstance(layer, nn.Conv2d | nn.Linear)
    }
    for part in names:
        if not any(part in name for name in layers):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers))
            raise UserError(
                f"lora.modules has {part!r}, but no convolution or linear layer of the autoencoder has it "
                f"in its name; the last parts of their names are {known}."
            )
    grouped = {name for name, layer in layers.items() if getattr(layer, "groups", 1) > 1}
    for name in grouped:
        # a name within a parent's, such as that of a stage, does not mean it
        if any(part in name.rpartition(".")[2] for part in names):
            raise UserError(
                f"lora.modules names {name}, a grouped convolution, whose LoRA cannot be merged: name other "
                "layers."
            )
    return [name for name in layers if name not in grouped and any(part in name for part in names)]


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model without LoRA, with LoRA added to its weights."""
    state = model.state_dict()
    merged = {name.replace(".base_layer.", "."): t for name, t in state.items() if ".lora_" not in name}
    return add_products(merged, trained_weights(model))


def add_products(weights: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` with `up x down` of each layer in `trained` (names as in `trained_weights`) added."""
    merged = dict(weights)
    for name, down in trained.items():
        layer, found, _ = name.partition(".lora_A.")
        if found:
            up = trained[f"{layer}.lora_B.weight"]
            # (O, r) x (r, I k k): the kernel of the two convolutions
            product = up.flatten(1) @ down.flatten(1)
            base = merged[f"{layer}.weight"]
            merged[f"{layer}.weight"] = base + product.view_as(base).to(base)
    return merged


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """LoRA (`<layer>.lora_A.weight` = down, `.lora_B.weight` = up) and the quantiser, by name."""
    return {
        name.replace(".default.", "."): tensor.detach()
        for name, tensor in model.state_dict().items()
        if ".lora_" in name or name.startswith("quantizer.")
    }


def save_adapter(folder: Path, model: nn.Module, base: str, base_sha256: str) -> None:
    """Write `folder`/adapter: LoRA in peft's layout, the quantiser's tensors in the same file."""
    target = folder / ADAPTER_FOLDER
    target.mkdir(parents=True, exist_ok=True)
    options = model.peft_config["default"]  # pyright: ignore
    description = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "base_sha256": base_sha256,
        "r": options.r,  # pyright: ignore
        "lora_alpha": options.lora_alpha,  # pyright: ignore
        "init_lora_weights": "gaussian",
        "target_modules": sorted(options.target_modules),  # pyright: ignore
    }
    (target / ADAPTER_CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    weights = {_PREFIX + name: tensor.cpu().contiguous() for name, tensor in trained_weights(model).items()}
    save_file(weights, target / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors of `folder`/adapter, by the names of `trained_weights`.

    Raises:
        UserError: the file is broken, or lacks one of the two factors of a layer.
    """
    file = folder / ADAPTER_FOLDER / ADAPTER_WEIGHTS
    with loading(file):
        found = {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(file).items()}
    layers: dict[str, set[str]] = {}
    for name in found:
        layer, lora, factor = name.partition(".lora_")
        if lora:
            layers.setdefault(layer, set()).add(factor)
    broken = [layer for layer, factors in layers.items() if factors != {"A.weight", "B.weight"}]
    if broken or not layers:
        raise UserError(f"{file} is not an adapter of a tokenizer: {broken[0] if broken else 'no LoRA'}.")
    return found


def import_peft() -> Any:
    """
    Raises:
        UserError: peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError(f"Adapters need peft ({error}): pip install 'open-unitok[train]'.") from error
    return peft


def up_weight(model: nn.Module, layer: str) -> nn.Parameter:
    """The `up` matrix of a layer with LoRA."""
    found: Any = model.get_submodule(layer)
    return found.lora_B["default"].weight
