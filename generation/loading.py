"""Find and check the parts of a pipeline: model folders, hub ids, fingerprints, quantization."""

import os
import re
from pathlib import Path
from typing import Any

import torch

from open_unitok.core.devices import check_dtype, set_device
from open_unitok.core.errors import UserError
from open_unitok.core.files import model_path, tokenizer_path
from open_unitok.mllm import UniTokForConditionalGeneration, UniTokMLLMConfig, UniTokProcessor
from open_unitok.mllm.config import check_mllm_quantizer
from open_unitok.mllm.loading import CLASS_TYPE, check_folder, check_vocabulary, folder_type
from open_unitok.mllm.lora import merge_adapter
from open_unitok.mllm.processor import CONFIG
from open_unitok.tokenizer import TokenLayout, UniTok

from .backends import check_known_quantization
from .backends.int8 import load_quantized, quantize_model


def find_model(folder: str | Path) -> Path:
    """The folder of an MLLM: a local folder, a shipped model by name, or the download of a hub id.

    Raises:
        UserError: there is no such folder or hub id, or it is not an MLLM.
    """
    path = model_path(folder)
    if os.path.isfile(path):
        raise UserError(f"{folder} is a file; a model is a folder with config.json, the weights and unitok/.")
    if not os.path.exists(path):
        path = download(str(folder))
    # a training checkpoint contains its model folder as model/
    if not (path / "config.json").exists() and (path / "model" / "config.json").exists():
        raise UserError(
            f"{folder} is not a model folder: it has no config.json. Did you mean {path / 'model'}?"
        )
    if folder_type(path) != CLASS_TYPE:
        check_folder(path)
    if not (path / "unitok" / "config.json").exists():
        raise UserError(f"{folder} has no visual tokenizer: copy its folder to {path / 'unitok'}.")
    return path


def load_unitok(name: str | Path, device: str, dtype: torch.dtype | str | None = None) -> UniTok:
    """The visual tokenizer of a tokenizer folder, a published .pth, an MLLM folder, or a hub id of these.

    Raises:
        UserError: there is no such tokenizer, device or dtype.
    """
    target, path = set_device(device), tokenizer_path(name)
    if not os.path.exists(path):
        path = tokenizer_path(download(str(name)))
    return UniTok.from_pretrained(path).to(device=target, dtype=check_dtype(dtype, target)).eval()


def download(name: str) -> Path:
    """The local copy of a hub model.

    Raises:
        UserError: `name` is not a valid hub id, or the download fails.
    """
    # an existing parent folder: a mistyped path, not a hub id
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) or os.path.isdir(Path(name).parent):
        raise UserError(f"{name} does not exist.")
    # deferred: only hub ids need it
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{name} is not a local folder, and the hub download failed: {reason[0] if reason else error!r}"
        ) from error


def check_parts_match(
    model: UniTokForConditionalGeneration, unitok: UniTok, processor: UniTokProcessor, folder: Path
) -> None:
    """
    Raises:
        UserError: the visual tokenizer is not the one whose codes the model was trained on, its codes cannot
            be read or generated, its images have another number of tokens, or the text tokenizer is another.
    """
    check_mllm_quantizer(unitok.config.quantizer, unitok.quantizer)
    # more rows than ids are valid: embeddings may be padded to a multiple
    rows = model.config.text_config.vocab_size
    if processor.vocab_size > rows:
        raise UserError(
            f"{folder}: the text tokenizer has {processor.vocab_size} ids, the model only {rows}: they do "
            "not match."
        )
    check_vocabulary(model.config, processor.vocabulary_fingerprint(), folder)
    _check_features(model.config, processor, folder)
    _check_image_tokens(model, unitok, processor, folder)
    for name in ("num_codebooks", "codebook_size"):
        if getattr(model.config, name) != getattr(unitok.config, name):
            raise UserError(
                f"{folder}: the model has {name} = {getattr(model.config, name)}, its tokenizer in unitok/ "
                f"{getattr(unitok.config, name)}: they do not match."
            )
    if model.config.book_sizes != unitok.quantizer.code_sizes:
        raise UserError(
            f"{folder}: the model has code_sizes = {model.config.book_sizes}, its tokenizer in unitok/ "
            f"{unitok.quantizer.code_sizes}: they do not match."
        )
    # with another tokenizer everything loads, but the images are noise
    expected = model.config.unitok_fingerprint
    if expected is not None and expected != (found := unitok.fingerprint()):
        raise UserError(
            f"{folder}: the model was trained on the codes of tokenizer {expected[:12]}, but unitok/ holds "
            f"{found[:12]}: replace it with the tokenizer of training."
        )


def _check_features(config: UniTokMLLMConfig, processor: UniTokProcessor, folder: Path) -> None:
    """
    Raises:
        UserError: model and processor differ in the features of images that are read, or these are others
            than in training.
    """
    names = ["visual_input"]
    if config.visual_input != "discrete":
        names += ["features", "num_continuous_tokens", "sep_token_id", "feature_token_id"]
    for name in names:
        ours, theirs = getattr(config, name), getattr(processor, name)
        if ours != theirs:
            raise UserError(f"{folder}: {name} = {ours!r} in config.json, but {theirs!r} in {CONFIG}.")
    if processor.feature_source is not None:
        processor.feature_source.check_fingerprint(config.features_fingerprint, str(folder))


def _check_image_tokens(
    model: UniTokForConditionalGeneration, unitok: UniTok, processor: UniTokProcessor, folder: Path
) -> None:
    """
    Raises:
        UserError: an image does not fit the context, or the processor's number of tokens is not that of the
            images it makes.
    """
    limit = model.config.context_length
    if limit is not None and model.config.read_length >= limit:
        raise UserError(
            f"{folder / 'config.json'}: an image that is read has {model.config.read_length} tokens, which "
            f"do not fit the model's context of {limit}."
        )
    for name, count in (("config.json", model.config), (CONFIG, processor)):
        if limit is not None and count.num_image_tokens >= limit:
            raise UserError(
                f"{folder / name}: num_image_tokens = {count.num_image_tokens} does not fit the model's "
                f"context of {limit}."
            )
    height, width = processor.image_shape
    patch, own = unitok.config.patch_size, unitok.config.layout
    layout = TokenLayout(height // patch, width // patch, own.registers, own.tokens)
    tokens = unitok.quantizer.num_embedded(layout)
    if tokens != processor.num_image_tokens:
        raise UserError(
            f"{folder / CONFIG}: num_image_tokens = {processor.num_image_tokens}, but images of {height} x "
            f"{width} pixels have {tokens} tokens."
        )


def check_quantization(quantization: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """
    Raises:
        UserError: `quantization` is unknown, or not available with this device and dtype.
    """
    check_known_quantization(quantization)
    if quantization is not None and (device.type != "cpu" or dtype != torch.float32):
        raise UserError(
            f"quantization = {quantization!r} needs device = cpu and dtype = float32 (of what is not "
            f"quantised), not {device} and {str(dtype).removeprefix('torch.')}: use None."
        )


def load_mllm(
    folder: Path, dtype: torch.dtype, adapter: Any, quantization: str | None
) -> tuple[UniTokForConditionalGeneration, UniTokProcessor, UniTok]:
    """Model, processor and float32 tokenizer of an MLLM folder; arguments as `Pipeline.from_pretrained`.

    Raises:
        UserError: the parts do not match.
    """
    unitok = UniTok.from_pretrained(folder / "unitok", dtype=torch.float32)
    # an adapter is merged into float weights; else each weight is quantised as it is read
    if quantization and adapter is None:
        model = load_quantized(folder)
    else:
        model = UniTokForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    processor = UniTokProcessor.from_pretrained(folder)
    processor.unitok = unitok
    # before casting the tokenizer: bfloat16 weights have another fingerprint
    check_parts_match(model, unitok, processor, folder)
    if adapter is not None:
        model = merge_adapter(model, adapter)
        if quantization:
            quantize_model(model)
    return model, processor, unitok
