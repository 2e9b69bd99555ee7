"""What may be loaded: model folders and hub ids, devices and number formats, each refused with its reason."""

import os
import re
from pathlib import Path

import torch

from open_unitok.core.devices import check_device, check_dtype
from open_unitok.core.errors import UserError
from open_unitok.core.files import model_path, tokenizer_path
from open_unitok.mllm import UniTokForConditionalGeneration, UniTokProcessor
from open_unitok.mllm.loading import check_folder
from open_unitok.tokenizer import UniTok

from .backends.native_library import library


def find_model(folder: str | Path) -> Path:
    """The folder of an MLLM: the one given, that of a shipped model, or the download of a hub id.

    Raises:
        UserError: nothing is there, or something of another kind; the message says what it is.
    """
    path = model_path(folder)
    if os.path.isfile(path):
        raise UserError(f"{folder} is a file; a model is a folder with config.json, the weights and unitok/.")
    if not os.path.exists(path):
        path = download(str(folder))
    if not (path / "config.json").exists() and (path / "model" / "config.json").exists():
        raise UserError(f"{folder} is no model folder: it has no config.json. Is {path / 'model'} meant?")
    check_folder(path)
    if not (path / "unitok" / "config.json").exists():
        raise UserError(f"{folder} has no visual tokenizer: copy its folder to {path / 'unitok'}.")
    return path


def load_unitok(name: str | Path, device: str, dtype: torch.dtype | str | None = None) -> UniTok:
    """The visual tokenizer of a tokenizer folder, a published .pth, an MLLM folder, or a hub id of these.

    Raises:
        UserError: nothing is there, or no such device or dtype.
    """
    target, path = check_device(device), tokenizer_path(name)
    if not os.path.exists(path):
        path = tokenizer_path(download(str(name)))
    return UniTok.from_pretrained(path).to(device=target, dtype=check_dtype(dtype, target)).eval()


def download(name: str) -> Path:
    """The local copy of a hub model.

    Raises:
        UserError: `name` cannot be a hub id, or the hub does not have or give it.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) or os.path.isdir(Path(name).parent):
        raise UserError(f"{name} does not exist.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{name} is no folder here, nor could it be had from the hub: {reason[0] if reason else error!r}"
        ) from error


def check_belongs(
    model: UniTokForConditionalGeneration, unitok: UniTok, processor: UniTokProcessor, folder: Path
) -> None:
    """
    Raises:
        UserError: the visual tokenizer is not the one whose codes the model was trained on, or the text
            tokenizer has ids that the model does not know.
    """
    rows = model.config.text_config.vocab_size
    if processor.vocab_size > rows:
        raise UserError(
            f"{folder}: its text tokenizer has {processor.vocab_size} ids, the model knows {rows}: they "
            "do not belong together."
        )
    for name in ("num_codebooks", "codebook_size"):
        if getattr(model.config, name) != getattr(unitok.config, name):
            raise UserError(
                f"{folder}: the model has {name} = {getattr(model.config, name)}, its tokenizer in unitok/ "
                f"{getattr(unitok.config, name)}: they do not belong together."
            )
    expected = model.config.unitok_fingerprint
    if expected is not None and expected != (found := unitok.fingerprint()):
        raise UserError(
            f"{folder}: the model was trained on the codes of tokenizer {expected[:12]}, but unitok/ holds "
            f"{found[:12]}: put the right tokenizer there."
        )


def check_weights(dtype: torch.dtype | str | None, device: torch.device) -> tuple[torch.dtype, str | None]:
    """The dtype to load in, and "int8" where drawing shall round the weights to 8 bits.

    Raises:
        UserError: there is no dtype of this name, or int8 is not to be had here.
    """
    if dtype not in ("int8", torch.int8):
        try:
            return check_dtype(dtype, device), None
        except UserError as error:
            raise UserError(
                f"{str(error)[:-1]}; on a CPU also int8, which draws with 8-bit weights."
            ) from error
    if device.type != "cpu" or library() is None:
        raise UserError(
            "dtype is int8, which needs device = cpu and, at the first drawing, a C++ compiler (g++ or "
            "clang++): take bfloat16."
        )
    return torch.float32, "int8"
