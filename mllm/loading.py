"""Checks of model folders before loading, and of state dicts while loading."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from open_unitok.core.errors import UserError
from open_unitok.core.text_files import read_json
from open_unitok.tokenizer.loading import check_weights_fit

from .config import UniTokMLLMConfig

PUBLISHED_TYPE = "mini_gemini"  # model_type of the published MLLM


def folder_type(folder: str | os.PathLike[str]) -> Any:
    """The model_type of a folder.

    Raises:
        UserError: it has no config.json.
    """
    config = Path(folder) / "config.json"
    if not config.exists():
        raise UserError(f"{folder} is not a model folder: it has no config.json.")
    return read_json(config).get("model_type")


def check_folder(folder: str | os.PathLike[str]) -> None:
    """
    Raises:
        UserError: `folder` is not an MLLM; the message names the model type found.
    """
    kind = folder_type(folder)
    if kind == PUBLISHED_TYPE:
        raise UserError(
            f"{folder} holds the published MLLM in its own format: convert it with "
            f"`unitok convert mllm {folder} NEW_FOLDER`."
        )
    if kind != UniTokMLLMConfig.model_type:
        hint = " That is a visual tokenizer, without a language model." if kind == "unitok" else ""
        raise UserError(
            f"{folder} holds a model of type {kind!r}, not an MLLM ({UniTokMLLMConfig.model_type!r}).{hint}"
        )


def check_complete_weights(folder: str | os.PathLike[str], info: Mapping[str, Any]) -> None:
    """Reject incomplete weights; `info` is transformers' loading info.

    transformers initialises missing weights randomly and only logs a warning.

    Raises:
        UserError: weights are missing; the message names them and the unexpected ones.
    """
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        found = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            for kind, names in (("missing", missing), ("unexpected", unexpected))
            if names
        )
        raise UserError(f"The weights in {folder} do not match its config.json ({found}).")


def assign_state(model: nn.Module, state: dict[str, Tensor], source: Any) -> None:
    """Assign `state` to a model that was built on the meta device; all names and shapes must match.

    Raises:
        UserError: names or shapes differ; the message shows the first of each kind.
    """
    check_weights_fit(source, state, model.state_dict(), "an MLLM")
    model.load_state_dict(state, assign=True)
    # RoPE tables are non-persistent buffers and still on the meta device: build these modules anew
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if "RotaryEmbedding" in type(child).__name__:
                setattr(parent, name, type(child)(child.config))
