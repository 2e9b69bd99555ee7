"""Finding and reading published weights of helper networks: a file, a folder that holds it, or a hub id."""

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from open_unitok.core.errors import UserError

HUB = "FoundationVision/unitok_external"  # where the published UniTok offers both helper networks


def find_weights(path: str | Path | None, names: Sequence[str], what: str, source: str) -> Path:
    """The weight file that `path` means, downloaded if it is a hub id.

    Args:
        path: a file, a folder that holds one of `names`, or a hub id ("owner/name").
        names: the published file's name first, then other accepted ones.
        what: what the weights are for, and `source`: where they come from; both for the message.

    Raises:
        UserError: nothing is there; the message names the file wanted and its origin.
    """
    hint = f"It is published as {names[0]}: {source}. Give its path, a folder that holds it, or a hub id."
    if not path:
        raise UserError(f"{what} has no weights: no path is set. {hint}")
    here = Path(path)
    if here.is_file():
        return here
    if here.is_dir():
        for name in names:
            if (here / name).is_file():
                return here / name
        raise UserError(f"{what}: the folder {path} holds no {' or '.join(names)}. {hint}")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)) or here.suffix in (
        ".pth",
        ".pt",
        ".safetensors",
    ):
        raise UserError(f"{what}: {path} does not exist. {hint}")
    return _download(str(path), names, what, hint)


def _download(repository: str, names: Sequence[str], what: str, hint: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    reason = ""
    for name in names:
        try:
            return Path(hf_hub_download(repository, name))
        except (EntryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise UserError(
        f"{what}: {repository} is neither a path here nor a hub repository that holds {' or '.join(names)} "
        f"({reason}). {hint}"
    )


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .pth or .safetensors file by name, in float32, never running code from the file.

    Raises:
        UserError: the file is no such file.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            weights = load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is no safetensors file: {error}") from error
    else:
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path} cannot be read as a file of weights: {reason}") from error
    if not isinstance(weights, Mapping) or not all(isinstance(t, Tensor) for t in weights.values()):
        raise UserError(f"{path} holds no plain mapping from names to tensors.")
    return {name: tensor.float() for name, tensor in weights.items()}


def load_exactly(module: torch.nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Put `weights` into `module`, all of them and nothing else.

    Raises:
        UserError: a name is missing or too many, or a shape differs; the message shows the first.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is too many" for name in found if name not in wanted]
    problems += [
        f"{name} has shape {found[name]}, {shape} is needed"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise UserError(f"{path} holds other weights than {type(module).__name__}: {problems[0]}.")
    module.load_state_dict(dict(weights))
