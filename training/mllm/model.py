"""The model of an MLLM run: new or loaded, with LoRA and frozen parts."""

import contextlib
import dataclasses
import inspect
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.utils import is_flash_attn_2_available

from open_unitok.core.devices import fast_bf16
from open_unitok.core.errors import UserError, did_you_mean
from open_unitok.core.files import (
    REPLAY_FOLDER,
    SAMPLING_FILE,
    existing,
    model_path,
    tokenizer_path,
    write_json,
)
from open_unitok.mllm import UniTokForConditionalGeneration, UniTokMLLMConfig, UniTokProcessor
from open_unitok.mllm.attention import VARLEN, supports_varlen
from open_unitok.mllm.features import feature_fields
from open_unitok.mllm.loading import check_vocabulary
from open_unitok.mllm.lora import add_lora
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.loading import check_tokenizer_folder

from ..core import deepspeed_engine
from ..core.replicas import SampleWithoutStoring, build_on_main, parameters_on_meta
from ..data import seeding
from .config import MODEL_PARTS, MLLMRunConfig, ModelOptions

# on a CPU one call per sample is slower than a mask in rows of 128 tokens, and faster from 512 on
VARLEN_ROW = 512


class MLLMParts(NamedTuple):
    """The parts of an MLLM folder."""

    model: Any  # UniTokForConditionalGeneration
    processor: UniTokProcessor | None  # None for a class-conditional model
    unitok: Path  # folder of the visual tokenizer
    sampling: Path | None = None  # recommended sampling settings, where the folder has them
    replay: Path | None = None  # data for `data.replay`, where the folder has them


def build_parts(config: MLLMRunConfig) -> MLLMParts:
    """The model that is trained: new or loaded, with adapters and frozen parts as configured.

    Raises:
        UserError: see `new_parts`, `load_parts`, `add_lora` and `choose_attention`.
    """
    if config.model:
        parts = new_parts(config)
    else:
        parts = load_parts(str(config.init_from), config.visual_positions, config.seed)
    decoder = parts.model.language_model
    decoder.set_attn_implementation(
        choose_attention(config.attention, config.engine.dtype, decoder, config.data.pack_to)
    )
    parts.model.residual_dtype = torch.bfloat16 if config.residual == "bf16" else None
    # adapters have their own seed: they do not depend on how the model was created
    torch.manual_seed(seeding.derive_seed(config.seed, "lora"))
    add_adapters(parts.model, config)
    freeze_parts(parts.model, config)
    if config.engine.gradient_checkpointing:
        deepspeed_engine.enable_activation_checkpointing(parts.model)
    return parts


def new_parts(config: MLLMRunConfig) -> MLLMParts:
    """A new MLLM around a trained visual tokenizer, with weights from the seed or from a trained decoder.

    Raises:
        UserError: a folder of another type, an unknown field, sizes that do not fit.
    """
    options = config.model
    assert options is not None
    folder = existing(
        tokenizer_path(options.unitok), "model.unitok must be the folder of a trained visual tokenizer."
    )
    check_tokenizer_folder(folder)
    unitok = load_tokenizer(folder)
    # transformers ignores unknown keys: check them here, with a did-you-mean
    allowed = set(inspect.signature(UniTokProcessor.__init__).parameters) - {"self", "text_tokenizer"}
    _check_keys(options.processor, allowed, "model.processor")
    sizes = {
        "image_size": unitok.config.image_size,
        "num_image_tokens": unitok.quantizer.num_embedded(unitok.config.layout),
        "token_layout": unitok.config.token_layout,
    }
    if features := feature_fields(unitok.config, options.fields):
        sizes |= {"num_continuous_tokens": features["num_continuous_tokens"]}
        sizes |= {name: options.fields[name] for name in ("visual_input", "features")}
    processor = UniTokProcessor.from_text_tokenizer(
        model_path(options.text_tokenizer), **{**sizes, **options.processor}
    )
    model = build_on_main(
        lambda: _new_model(config, options, unitok, processor), UniTokForConditionalGeneration
    )
    return MLLMParts(model, processor, folder)


def load_tokenizer(folder: Path) -> UniTok:
    """The visual tokenizer of a folder, in float32."""
    # on every rank: quantisers and towers of other libraries cannot be built without memory
    return UniTok.from_pretrained(folder, dtype=torch.float32)


def _new_model(
    config: MLLMRunConfig, options: ModelOptions, unitok: UniTok, processor: UniTokProcessor
) -> UniTokForConditionalGeneration:
    decoder = _load_decoder(options.language_model) if options.language_model else None
    mllm_config = _mllm_config(options, unitok, processor, decoder)
    torch.manual_seed(seeding.derive_seed(config.seed, "model"))
    if decoder is None:
        model = UniTokForConditionalGeneration(mllm_config)
    else:
        with _without_decoder():
            model = UniTokForConditionalGeneration(mllm_config)
        tied = model.lm_head.weight is model.get_input_embeddings().weight
        # the tensors themselves: a copy of them would double the host memory
        model.language_model.load_state_dict(decoder.get_decoder().state_dict(), assign=True)
        model.lm_head.load_state_dict(decoder.get_output_embeddings().state_dict(), assign=True)
        if tied:
            model.tie_weights()
        # the processor may have added boi and eoi to the decoder's vocabulary
        if processor.vocab_size > model.config.text_config.vocab_size:
            model.resize_token_embeddings(processor.vocab_size)
    # copies the code table and initialises the causal projection
    model.init_from_tokenizer(unitok)
    return model


@contextlib.contextmanager
def _without_decoder() -> Iterator[None]:
    """Within, an MLLM's decoder gets no memory for parameters, but the parts after it keep their numbers."""
    original = AutoModel.from_config

    def on_meta(config: Any, **kwargs: Any) -> Any:
        with parameters_on_meta():
            return original(config, **kwargs)

    AutoModel.from_config = on_meta
    try:
        with SampleWithoutStoring():
            yield
    finally:
        AutoModel.from_config = original


def _mllm_config(
    options: ModelOptions, unitok: UniTok, processor: UniTokProcessor, decoder: Any
) -> UniTokMLLMConfig:
    """The config of a new model; `decoder` is a trained one or None."""
    fields: dict[str, Any] = {name: i for name, i in processor.token_ids().items() if i is not None}
    known = {field.name for field in dataclasses.fields(UniTokMLLMConfig)}
    _check_keys(options.fields, known, "model.fields")
    _check_keys(options.text, _decoder_fields(options.text.get("model_type", "llama")), "model.text")
    _check_keys(options.depth, _decoder_fields("llama"), "model.depth")
    if decoder is not None and options.text:
        raise UserError(
            "model.text and model.language_model exclude each other: a trained decoder has its sizes."
        )
    if decoder is not None:
        fields["text_config"] = decoder_config(decoder.config)
    else:
        ids = {"vocab_size": processor.vocab_size, "bos_token_id": processor.bos_token_id}
        text = {"model_type": "llama", **ids, "eos_token_id": processor.eos_token_id, **options.text}
        if text["vocab_size"] < processor.vocab_size:
            raise UserError(
                f"model.text.vocab_size is {text['vocab_size']}, but the text tokenizer has "
                f"{processor.vocab_size} ids: omit the key."
            )
        fields["text_config"] = text
    fields |= {"depth_config": options.depth, **options.fields}
    return UniTokMLLMConfig.for_tokenizer(unitok.config, **fields)


def load_parts(name: str, visual_positions: str | None = None, seed: int = 0) -> MLLMParts:
    """The MLLM of a folder, or the shipped one of this name, in float32, for further training.

    Args:
        visual_positions: as in `MLLMRunConfig`; `seed` samples the added vectors.

    Raises:
        UserError: not an MLLM folder, one without its visual tokenizer, or one that cannot have
            `visual_positions`.
    """
    folder = existing(
        model_path(name), "init_from must be the folder of a trained MLLM, e.g. runs/pretrain/model."
    )

    def build() -> Any:
        model = UniTokForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        if visual_positions and model.config.visual_positions == "none":
            torch.manual_seed(seeding.derive_seed(seed, "visual_positions"))
            model.visual_embedder = model.visual_embedder.with_positions()
            model.config.visual_positions = visual_positions
        return model

    model = build_on_main(build, UniTokForConditionalGeneration)
    unitok = existing(folder / "unitok", "The visual tokenizer of an MLLM must be in that folder.")
    load_tokenizer(unitok)  # a broken one would only be found after training, in the copy
    sampling, replay = folder / SAMPLING_FILE, folder / REPLAY_FOLDER
    processor = UniTokProcessor.from_pretrained(folder)
    check_vocabulary(model.config, processor.vocabulary_fingerprint(), folder)
    return MLLMParts(
        model,
        processor,
        unitok,
        sampling if sampling.exists() else None,
        replay if replay.exists() else None,
    )


def save_parts(parts: MLLMParts, path: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write an MLLM folder: weights (from `state` if ZeRO 3 sharded them), processor, and `unitok/`. With
    LoRA only the adapter."""
    prepare_folder(parts, path, state)()


def prepare_folder(
    parts: MLLMParts, path: Path, state: dict[str, torch.Tensor] | None = None
) -> Callable[[], None]:
    """The first part of `save_parts`; the returned function does the rest, in another thread if need be."""
    adapter = getattr(parts.model, "_hf_peft_config_loaded", False)
    if parts.processor is not None:
        parts.model.config.vocabulary_fingerprint = parts.processor.vocabulary_fingerprint()
        # not in another thread: a fast tokenizer allows one user at a time
        if not adapter:
            parts.processor.save_pretrained(path)

    def write() -> None:
        parts.model.save_pretrained(path, state_dict=state)
        # save_pretrained has written only the adapter; the base folder has everything else
        if adapter:
            return
        shutil.copytree(parts.unitok, path / "unitok", dirs_exist_ok=True)
        if parts.replay:  # its codes stay valid, since the sub-codebooks are frozen
            shutil.copytree(parts.replay, path / REPLAY_FOLDER, dirs_exist_ok=True)
        if parts.sampling:
            shutil.copy(parts.sampling, path / SAMPLING_FILE)
        elif parts.processor is None:  # without guidance, which a model without a null class cannot have
            write_json(path / SAMPLING_FILE, {"guidance": 1.0})

    return write


def add_adapters(model: Any, config: MLLMRunConfig) -> None:
    """LoRA as configured, on a base that keeps its dtype or is rounded to bf16."""
    lora = config.lora
    if lora is None:
        return
    modules = [MODEL_PARTS[part].rstrip(".") for part in lora.parts]
    add_lora(model, modules, lora.rank, lora.alpha, lora.dropout)
    if lora.base == "bf16":
        for name, parameter in model.named_parameters():
            # the visual embedder keeps fp32: it normalises codebook rows, where bf16 would lose codes
            if not parameter.requires_grad and not name.startswith(MODEL_PARTS["visual_embedder"]):
                parameter.data = parameter.data.to(torch.bfloat16)


def freeze_parts(model: Any, config: MLLMRunConfig) -> None:
    """Freeze parts with factor 0, and the sub-codebooks, because stored codes refer to their entries.

    Raises:
        UserError: the config names a part that the model lacks, or nothing is left to train.
    """
    named = {*config.lr_factors, *(config.lora.parts if config.lora else ())}
    if "feature_adapter" in named and model.feature_adapter is None:
        raise UserError("This model has no feature_adapter: its visual_input is 'discrete'.")
    for name, parameter in model.named_parameters():
        if config.lr_factor(name) == 0:
            parameter.requires_grad_(False)
    model.visual_embedder.freeze_codebooks()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("lr_factors freeze every part: nothing is left to train.")


def choose_attention(name: str, dtype: str, decoder: Any, pack_to: int) -> str:
    """The attention implementation of a decoder, by transformers' names.

    "auto" is flash_attention_2 where it can run, else "varlen" on a GPU (not run on one yet) and for long
    packed rows on a CPU, else "sdpa".

    Args:
        pack_to: tokens of a packed row, 0 = one sample per row.
        dtype: engine.dtype. FlashAttention has 16-bit kernels only, and transformers would call it in the
            dtype of the fp32 weights.

    Raises:
        UserError: the requested one is not available, or not with this dtype or decoder.
    """
    cuda = torch.cuda.is_available()
    available = cuda and is_flash_attn_2_available()
    half = dtype == "bf16" or (dtype == "auto" and fast_bf16())
    if name == "flash_attention_2" and not available:
        raise UserError(
            "attention: flash_attention_2 needs a CUDA GPU and the package flash-attn, and at least one of "
            "them is missing (see `unitok doctor`): use `auto` or `sdpa`."
        )
    if name == "flash_attention_2" and not half:
        raise UserError(
            f"attention: flash_attention_2 needs bf16, but engine.dtype {dtype} is fp32 here: set "
            "engine.dtype to bf16, or attention to sdpa."
        )
    if name == "varlen" and not supports_varlen(decoder):
        raise UserError(
            f"attention: varlen is not for a {decoder.config.model_type!r}, whose attention is more than a "
            "causal mask: use `auto` or `eager`."
        )
    if name == "auto" and available and half:
        return "flash_attention_2"
    if name == "varlen" or (name == "auto" and (cuda or pack_to >= VARLEN_ROW) and supports_varlen(decoder)):
        return VARLEN
    return "sdpa" if name == "auto" else name


def decoder_config(config: Any) -> Any:
    """The config of the decoder of a causal language model, or of that of an MLLM."""
    return config.text_config if isinstance(config, UniTokMLLMConfig) else config


def _load_decoder(folder: str) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(str(model_path(folder)), dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.language_model {folder} cannot be loaded: {str(error).splitlines()[0]}"
        ) from error


def _decoder_fields(model_type: str) -> set[str]:
    """The config fields of a family of decoders."""
    try:
        # rope_theta is accepted, but stored under another key by newer versions
        return set(AutoConfig.for_model(model_type).to_dict()) | {"rope_theta"}
    except ValueError as error:
        raise UserError(
            f"model.text.model_type is {model_type!r}, which is not a decoder of transformers."
        ) from error


def _check_keys(given: dict[str, Any], known: set[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise UserError(f"Unknown config key '{where}.{key}'.{did_you_mean(key, known)}")
