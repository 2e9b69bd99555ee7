"""Find and read weight files: a file, a folder that holds it, or a hub id.

Nothing here runs code from a file: pickles are read with `weights_only=True`.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_unitok.core.errors import UserError

from .folder_checks import loading, read_config, read_pickle

HELPER_HUB_ID = "FoundationVision/unitok_external"  # the published LPIPS and DINOv2 weights


def check_tokenizer_folder(folder: str | os.PathLike[str]) -> None:
    """
    Raises:
        UserError: `folder` does not hold a visual tokenizer; the message names the model type found.
    """
    config = read_config(folder)
    kind = config.get("model_type")
    if kind == "unitok" and "path" in (config.get("encoder_options") or {}):
        raise UserError(f"{folder}: encoder_options has a path, but a saved tokenizer holds its own tower.")
    if kind != "unitok":
        inside = Path(folder) / "unitok"
        hint = f" Its visual tokenizer is in {inside}." if inside.is_dir() else ""
        raise UserError(f"{folder} holds a model of type {kind!r}, not a visual tokenizer ('unitok').{hint}")


def find_weights(path: str | Path | None, names: Sequence[str], what: str, source: str) -> Path:
    """The weight file at `path`, downloaded if `path` is a hub id.

    Args:
        path: a file, a folder that holds one of `names`, or a hub id ("owner/name").
        names: accepted file names, the published one first.
        what, source: name of the model and where it is published; both for error messages.

    Raises:
        UserError: there is no such file; the message names the expected file and its source.
    """
    hint = f"It is published as {names[0]}: {source}. Give its path, a folder that holds it, or a hub id."
    if not path:
        raise UserError(f"{what} has no weights: no path is set. {hint}")
    local = Path(path)
    if local.is_file():
        return local
    if local.is_dir():
        for name in names:  # in order of preference
            if (local / name).is_file():
                return local / name
        raise UserError(f"{what}: the folder {path} has no {' or '.join(names)}. {hint}")
    # "owner/name" may be a hub id; with the suffix of a weight file it is a mistyped path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)) or local.suffix in (
        ".pth",
        ".pt",
        ".safetensors",
    ):
        raise UserError(f"{what}: {path} does not exist. {hint}")
    return _download(str(path), names, what, hint)


def _download(hub_id: str, names: Sequence[str], what: str, hint: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    reason = ""  # of the last attempt
    for name in names:
        try:
            return Path(hf_hub_download(hub_id, name))
        except (EntryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
            reason = _first_line(error)  # a missing file is no failure yet: the next name may exist
    raise UserError(
        f"{what}: {hub_id} is neither a local path nor a hub repository that holds {' or '.join(names)} "
        f"({reason}). {hint}"
    )


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """The content of a .pth or .safetensors file.

    Raises:
        UserError: there is no such file, or it cannot be read without running code from it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not an existing file.")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        with loading(path):
            return load_file(path)
    return read_pickle(path)


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a published checkpoint, averaged weights first; without DistributedDataParallel's
    "module.".

    Raises:
        UserError: the file is not readable, or holds none.
    """
    found = read_checkpoint(path)
    for key in ("ema", "model", "state_dict"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not isinstance(found, Mapping) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise UserError(f"{path} does not hold a state dict (names to tensors).")
    return {name.removeprefix("module."): tensor for name, tensor in found.items()}


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .pth or .safetensors file by name, in float32.

    Raises:
        UserError: the file is not readable or does not map names to tensors.
    """
    weights = read_checkpoint(path)
    if not isinstance(weights, Mapping) or not all(isinstance(t, Tensor) for t in weights.values()):
        raise UserError(f"{path} does not hold a plain mapping from names to tensors.")
    return {name: tensor.float() for name, tensor in weights.items()}


def check_weights_fit(
    path: str | os.PathLike[str], weights: Mapping[str, Tensor], target: Mapping[str, Tensor], what: str
) -> None:
    """Compare names and shapes of a file's weights with a state dict.

    Raises:
        UserError: they differ; the message shows the first of each kind. `what` names the target.
    """
    problems = []
    if missing := sorted(target.keys() - weights.keys()):
        problems.append(f"{len(missing)} weights are missing ({missing[0]}, ...)")
    if unexpected := sorted(weights.keys() - target.keys()):
        problems.append(f"{len(unexpected)} are unexpected ({unexpected[0]}, ...)")
    for name in sorted(target.keys() & weights.keys()):
        found, expected = tuple(weights[name].shape), tuple(target[name].shape)
        if found != expected:  # one is enough: with a wrong config hundreds differ
            problems.append(f"{name} has shape {found}, expected {expected}")
            break
    if problems:
        raise UserError(f"{path} does not fit {what}: " + "; ".join(problems) + ".")


def load_exactly(module: torch.nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Load `weights` into `module`: all of them and nothing else.

    Raises:
        UserError: names or shapes differ.
    """
    check_weights_fit(path, weights, module.state_dict(), type(module).__name__)
    module.load_state_dict(dict(weights))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
