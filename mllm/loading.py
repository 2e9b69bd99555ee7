"""What a model folder on disk holds, before anything of it is loaded."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from open_unitok.core.errors import UserError
from open_unitok.core.files import read_json

from .config import UniTokMLLMConfig

PUBLISHED_TYPE = "mini_gemini"  # model_type of the published MLLM


def folder_type(folder: str | os.PathLike[str]) -> Any:
    """The model_type of a folder.

    Raises:
        UserError: it has no config.json.
    """
    config = Path(folder) / "config.json"
    if not config.exists():
        raise UserError(f"{folder} is no model folder: it has no config.json.")
    return read_json(config).get("model_type")


def check_folder(folder: str | os.PathLike[str]) -> None:
    """
    Raises:
        UserError: `folder` holds no MLLM; the message says what it holds.
    """
    kind = folder_type(folder)
    if kind == PUBLISHED_TYPE:
        raise UserError(
            f"{folder} holds the published MLLM in its own layout: rewrite it with "
            f"`unitok convert mllm {folder} NEW_FOLDER`."
        )
    if kind != UniTokMLLMConfig.model_type:
        hint = " That is a visual tokenizer: it draws and reads no text." if kind == "unitok" else ""
        raise UserError(
            f"{folder} holds a model of type {kind!r}, not an MLLM ({UniTokMLLMConfig.model_type!r}).{hint}"
        )


def check_complete(folder: str | os.PathLike[str], info: Mapping[str, Any]) -> None:
    """Refuse a model that would be part random; `info` is what transformers tells of a loading.

    Raises:
        UserError: weights are missing; the message names them and those that are there instead.
    """
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        found = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            for kind, names in (("missing", missing), ("unexpected", unexpected))
            if names
        )
        raise UserError(f"{folder} does not hold the weights of its config.json ({found}).")
