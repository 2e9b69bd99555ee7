"""The MLLM of a run with all that belongs to it: built around a visual tokenizer, or loaded from a folder."""

import inspect
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from open_unitok.core.errors import UserError, did_you_mean
from open_unitok.core.files import SAMPLING_FILE as SAMPLING
from open_unitok.core.files import existing, model_path
from open_unitok.mllm import UniTokForConditionalGeneration, UniTokMLLMConfig, UniTokProcessor
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.loading import check_tokenizer_folder

from ..data import seeding
from .config import MLLMRunConfig


class Parts(NamedTuple):
    """What an MLLM folder is made of."""

    model: Any  # UniTokForConditionalGeneration
    processor: UniTokProcessor
    unitok: Path  # folder of the visual tokenizer
    sampling: Path | None = None  # how the model draws best, where its folder says so


def new_parts(config: MLLMRunConfig) -> Parts:
    """A new MLLM around a trained visual tokenizer; weights are drawn by the seed, or come with the decoder.

    Raises:
        UserError: a folder of another kind, an unknown field, sizes that do not fit.
    """
    wanted = config.model
    assert wanted is not None
    folder = existing(wanted.unitok, "model.unitok is the folder of a trained visual tokenizer.")
    check_tokenizer_folder(folder)
    unitok = UniTok.from_pretrained(folder, dtype=torch.float32)
    options = set(inspect.signature(UniTokProcessor.__init__).parameters) - {"self", "text_tokenizer"}
    _check_keys(wanted.processor, options, "model.processor")
    sizes = {"image_size": unitok.config.image_size, "num_image_tokens": unitok.config.num_visual_tokens}
    processor = UniTokProcessor.from_text_tokenizer(wanted.text_tokenizer, **{**sizes, **wanted.processor})
    base = _decoder(wanted.language_model) if wanted.language_model else None
    fields: dict[str, Any] = {name: i for name, i in processor.token_ids().items() if i is not None}
    _check_keys(wanted.fields, set(UniTokMLLMConfig().to_dict()), "model.fields")
    _check_keys(wanted.text, _known_fields(wanted.text.get("model_type", "llama")), "model.text")
    _check_keys(wanted.depth, _known_fields("llama"), "model.depth")
    if base is None:
        ids = {"vocab_size": processor.vocab_size, "bos_token_id": processor.bos_token_id}
        text = {"model_type": "llama", **ids, "eos_token_id": processor.eos_token_id, **wanted.text}
        if text["vocab_size"] < processor.vocab_size:
            raise UserError(
                f"model.text.vocab_size is {text['vocab_size']}, but the text tokenizer has "
                f"{processor.vocab_size} ids: leave the key out."
            )
        fields["text_config"] = text
    elif wanted.text:
        raise UserError("model.text and model.language_model exclude each other: the folder has sizes.")
    else:
        fields["text_config"] = base.config
    fields |= {"depth_config": wanted.depth, **wanted.fields}
    mllm_config = UniTokMLLMConfig.for_tokenizer(unitok.config, **fields)
    torch.manual_seed(seeding.derive_seed(config.seed, "model"))
    model = UniTokForConditionalGeneration(mllm_config)
    if base is not None:
        model.language_model.load_state_dict(base.get_decoder().state_dict())
        model.lm_head.load_state_dict(base.get_output_embeddings().state_dict())
        if processor.vocab_size > model.config.text_config.vocab_size:
            model.resize_token_embeddings(processor.vocab_size)
    model.init_from_tokenizer(unitok)
    return Parts(model, processor, folder)


def load_parts(name: str) -> Parts:
    """The MLLM of a folder, or the shipped one of this name, in float32, for further training.

    Raises:
        UserError: no MLLM folder, or one without its visual tokenizer.
    """
    folder = existing(
        model_path(name), "init_from is the folder of a trained MLLM, e.g. runs/pretrain/model."
    )
    model = UniTokForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    unitok = existing(folder / "unitok", "An MLLM folder holds its visual tokenizer there.")
    own = folder / SAMPLING
    return Parts(model, UniTokProcessor.from_pretrained(folder), unitok, own if own.exists() else None)


def save_parts(parts: Parts, path: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write an MLLM folder: weights (`state`, where they had to be gathered), processor, and `unitok/`; with
    adapters, these alone."""
    parts.model.save_pretrained(path, state_dict=state)
    if parts.model._hf_peft_config_loaded:
        return
    parts.processor.save_pretrained(path)
    shutil.copytree(parts.unitok, path / "unitok", dirs_exist_ok=True)
    if parts.sampling:
        shutil.copy(parts.sampling, path / SAMPLING)


def _decoder(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.language_model {folder} cannot be loaded: {str(error).splitlines()[0]}"
        ) from error


def _known_fields(kind: str) -> set[str]:
    """The fields of a family's config."""
    from transformers import AutoConfig

    try:
        return set(AutoConfig.for_model(kind).to_dict()) | {"rope_theta"}
    except ValueError as error:
        raise UserError(f"model.text.model_type is {kind!r}: no decoder that transformers knows.") from error


def _check_keys(given: dict[str, Any], known: set[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise UserError(f"Unknown config key '{where}.{key}'.{did_you_mean(key, known)}")
