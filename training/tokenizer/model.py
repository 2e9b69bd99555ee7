"""Building and initialising the model of the tokenizer stage (arXiv 2502.20321, sections 3.1 and 4.1)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from open_unitok.core import distributed
from open_unitok.core.errors import UserError, did_you_mean
from open_unitok.core.files import tokenizer_path
from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.tokenizer.caption_tokenizer import CAPTION_TOKENIZER_FOLDER, CaptionTokenizer
from open_unitok.tokenizer.convert import read_clip_weights
from open_unitok.tokenizer.encoders import resolve_paths
from open_unitok.tokenizer.encoders.vision_tower import VisionTower
from open_unitok.tokenizer.layers import Transformer, init_kaiming
from open_unitok.tokenizer.loading import check_weights_fit, find_weights
from open_unitok.tokenizer.quantizers.multi_codebook import check_disentangle
from open_unitok.tokenizer.quantizers.published import load_quantizer
from open_unitok.tokenizer.text_tower import TextEncoder
from open_unitok.tokenizer.token_transformer import QueryResampler, TokenTransformer
from open_unitok.tokenizer.words import Words

from ..core import deepspeed_engine
from ..core.replicas import materialise
from ..data import seeding
from .config import TokenizerRunConfig
from .words import read_run_words, set_words, word_sizes

# stacks of transformer blocks in an encoder or decoder
BLOCK_STACKS = (Transformer, TokenTransformer, QueryResampler, VisionTower)
CLIP_FILES = ("open_clip_pytorch_model.bin", "pytorch_model.bin", "open_clip_model.safetensors")


def load_caption_tokenizer(config: TokenizerRunConfig) -> Any:
    """The CLIP-style tokenizer of captions, or None without the contrastive loss.

    Raises:
        UserError: the config names none, and the model at `init_from` holds none.
    """
    if not config.losses.clip:
        return None
    length = config.model.get("text_context_length", _initial_config(config).text_context_length)
    if config.caption_tokenizer is not None:
        return CaptionTokenizer.from_path(config.caption_tokenizer, length)
    folder = tokenizer_path(config.init_from or "")
    if not (folder / CAPTION_TOKENIZER_FOLDER).is_dir():
        raise UserError(
            f"losses.clip is {config.losses.clip}, but init_from ({config.init_from}) holds no caption "
            "tokenizer: set caption_tokenizer, or set losses.clip to 0."
        )
    return CaptionTokenizer.from_model_folder(folder, length)


def _initial_config(config: TokenizerRunConfig) -> UniTokConfig:
    """The config of the folder at `init_from`, else the default one."""
    folder = tokenizer_path(config.init_from) if config.init_from else None
    known = folder is not None and (folder / "config.json").exists()
    return UniTokConfig.from_pretrained(str(folder)) if known else UniTokConfig()


def build_model(config: TokenizerRunConfig, captions: Any, device: torch.device | str = "cpu") -> UniTok:
    """A new tokenizer (random weights of `seed`), or the one at `init_from`; parts in `freeze` are frozen.

    Every rank builds it, and gets the weights of rank 0 on `device`.

    Raises:
        UserError: an unknown field of `model`, or one that differs from the model at `init_from`.
    """
    size, fields, words = model_fields(config)
    own_sizes = dict(fields)
    if captions is not None:
        own_sizes.setdefault("text_vocab_size", captions.vocab_size)
    wanted = UniTokConfig.named(size, **own_sizes)
    if config.init_from is None:
        _check_text_tower(wanted, config)
    if captions is not None and wanted.text_vocab_size < captions.vocab_size:
        raise UserError(
            f"model.text_vocab_size is {wanted.text_vocab_size}, but {config.caption_tokenizer} has "
            f"{captions.vocab_size} ids: leave the key out."
        )
    # on every rank: quantisers and towers of other libraries cannot be built without memory
    model = _initial_model(config, fields, wanted, words, captions)
    materialise(model, torch.device(device))
    for part in config.freeze:
        _submodule(model, part).requires_grad_(False)
    set_up_quantizer(model, config)
    # without a gradient, weight decay would still shrink these
    if not config.losses.clip and model.config.embed_dim:
        for part in (model.text_encoder, model.image_norm, model.image_projection):
            part.requires_grad_(False)
        model.logit_scale.requires_grad_(False)
    if config.engine.gradient_checkpointing:
        recompute_activations(model, config.recompute)
    return model


def model_fields(config: TokenizerRunConfig) -> tuple[str, dict[str, Any], Words | None]:
    """Named size, fields of UniTokConfig and words of the section `model`.

    Raises:
        UserError: an unknown field of `model`; words that do not exist, or that the model cannot have.
    """
    fields = dict(config.model)
    size = fields.pop("size", "vitamin_large")
    known = set(UniTokConfig().to_dict()) - {"model_type", "transformers_version"}
    for key in fields:
        if key not in known:
            raise UserError(f"Unknown config key 'model.{key}'.{did_you_mean(key, known)}")
    fields = {name: value for name, value in fields.items() if name != "codebook_size" or value is not None}
    words = read_run_words(config)
    return size, fields if words is None else fields | word_sizes(words, fields), words


def recompute_activations(model: UniTok, what: str) -> None:
    """Recompute activations of "all" parts, or of "convolutions" and projections, in the backward pass."""
    deepspeed_engine.enable_activation_checkpointing(model)
    if what == "convolutions":
        keep_blocks(model)


def keep_blocks(model: UniTok) -> None:
    """Keep the activations of transformer blocks after all."""
    for stack in model.modules():
        if isinstance(stack, (*BLOCK_STACKS, TextEncoder)):
            for module in stack.modules():
                if hasattr(module, "gradient_checkpointing"):
                    module.gradient_checkpointing = False  # pyright: ignore


def _initial_model(
    config: TokenizerRunConfig,
    fields: Mapping[str, Any],
    wanted: UniTokConfig,
    words: Words | None,
    captions: Any,
) -> UniTok:
    """The model with the weights that the run starts from."""
    if config.init_from is not None:
        model = _start_from(config.init_from, fields, wanted)
        _check_text_tower(model.config, config)
        if captions is not None and not _has_vocabulary(model, config, captions):
            model = _with_new_text_tower(model, config, captions)
        return model
    torch.manual_seed(seeding.derive_seed(config.seed, "model"))
    model = UniTok(wanted)
    if words is not None:
        set_words(model, words)
    if config.decoder_init == "kaiming":
        init_kaiming(model.decoder)
    if config.init_from_clip:
        _init_from_clip(model, config.init_from_clip)
    if config.init_quantizer:
        load_quantizer(model.quantizer, model.config, config.init_quantizer)
    return model


def _submodule(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """
    Raises:
        UserError: the model has no such submodule.
    """
    outer, _, last = name.rpartition(".")
    parent = _submodule(model, outer) if outer else model
    children = dict(parent.named_children())
    if last not in children:
        hint = did_you_mean(last, children)
        raise UserError(f"freeze has {name!r}, but {outer or 'the model'} has no part {last!r}.{hint}")
    return children[last]


def set_up_quantizer(model: UniTok, config: TokenizerRunConfig) -> None:
    """Set what the quantiser does in this run.

    Raises:
        UserError: it cannot do what the run asks of it.
    """
    quantizer = model.quantizer
    kind = type(quantizer).__name__
    quantizer.frozen = "quantizer" in config.freeze
    if quantizer.moves_rows and config.codebooks.reset_after:
        raise UserError(
            f"codebooks.reset_after is {config.codebooks.reset_after}, but the rows of {kind} move in the "
            "forward pass: set it to 0."
        )
    if not quantizer.trains_rows and quantizer.codebooks is not None and quantizer.codebooks.requires_grad:
        raise UserError(f"The rows of {kind} follow the latents: an optimiser must not move them as well.")
    for part in () if quantizer.trains_rows else config.lr_factors:
        if part in "quantizer.codebooks":
            raise UserError(f"lr_factors.{part} names the rows of {kind}, which no optimiser moves: omit it.")
    if quantizer.moves_rows and quantizer.trains_rows and config.engine.zero_stage:
        # its fp32 copies of the rows would undo what the forward pass does
        raise UserError(
            f"engine.zero_stage is {config.engine.zero_stage}, but the rows of {kind} move in the forward "
            "pass and by the optimiser: set it to 0."
        )
    if config.losses.disentangle:
        if not hasattr(quantizer, "disentangle"):
            raise UserError(
                f"losses.disentangle is {config.losses.disentangle}, but {kind} has no such loss: set it "
                "to 0."
            )
        check_disentangle(len(quantizer.code_sizes))
        quantizer.disentangle = True  # pyright: ignore
    _check_losses(model, config)


def _check_text_tower(sizes: UniTokConfig, config: TokenizerRunConfig) -> None:
    """
    Raises:
        UserError: the run trains, freezes or loads a text tower that a tokenizer with embed_dim 0 lacks.
    """
    needs = {
        f"losses.clip is {config.losses.clip}": config.losses.clip > 0,
        f"freeze is {config.freeze}": "text_encoder" in config.freeze,
        f"init_from_clip is {config.init_from_clip}": bool(config.init_from_clip),
    }
    for key, needed in needs.items():
        if needed and not sizes.embed_dim:
            raise UserError(f"{key}, but embed_dim is 0: the tokenizer has no text tower.")


def _check_losses(model: UniTok, config: TokenizerRunConfig) -> None:
    """Quantise one image of zeros: a loss that the quantiser lacks must not stop the first step.

    Raises:
        UserError: the run weighs a loss that the quantiser does not have.
    """
    quantizer, training = model.quantizer, model.quantizer.training
    quantizer.eval()
    width = quantizer.latent_dim * (1 + quantizer.moments)
    latents = torch.zeros(1, model.config.layout.num_tokens, width, device=model.device)
    with torch.no_grad():
        found = quantizer(latents, entropy=config.losses.entropy > 0).losses
    quantizer.train(training)
    kind, only = type(quantizer).__name__, f"only {', '.join(found)}" if found else "none at all"
    for name in config.losses.extra:
        if name not in found:
            raise UserError(f"losses.extra has {name!r}, but {kind} has no such loss, {only}.")
    # of a continuous autoencoder nothing but its own loss; others may have a loss in training alone
    for name in ("kl",) if quantizer.discrete else ("vq", "entropy", "kl"):
        weight = config.losses.by_name()[name]
        if weight and name not in found:
            raise UserError(f"losses.{name} is {weight}, but {kind} has no such loss, {only}: set it to 0.")
    if quantizer.moments and not config.losses.kl:
        raise UserError(
            "quantizer_options.posterior is kl, but losses.kl is 0: weigh it (LDM: 1e-6), or take posterior: "
            "none."
        )


def _start_from(path: str, fields: Mapping[str, Any], wanted: UniTokConfig) -> UniTok:
    """The tokenizer at `init_from`; the run's `fields` may change image size, token merging and drop path.

    Raises:
        UserError: there is no model, or another field differs from the model's.
    """
    options = fields.get("encoder_options") or {}
    model = _load_pretrained(path, {key: options[key] for key in options if key == "merge"})
    if "image_size" in fields and wanted.image_size != model.config.image_size:
        model = _with_image_size(model, wanted.image_size)
    if wanted.drop_path_rate != model.config.drop_path_rate and "drop_path_rate" in fields:
        _set_drop_path(model, wanted.drop_path_rate)
    check_repeated_fields(model.config, fields, wanted)
    return model


def check_repeated_fields(found: UniTokConfig, fields: Mapping[str, Any], wanted: UniTokConfig) -> None:
    """
    Raises:
        UserError: one of the run's `fields` differs from those of the model at `init_from`.
    """
    # sizes may be repeated in the config, but not changed; a tower is compared by its fields
    wanted, _ = resolve_paths(wanted)
    for key in fields:
        other, given = getattr(found, key), getattr(wanted, key)
        if key == "encoder_options" and "merge" in (fields[key] or {}):  # added to the model's, or taken away
            given = {**(other or {}), **given}
            given = {
                name: value for name, value in given.items() if name != "merge" or value is not None
            } or None
        if other != given:
            raise UserError(f"model.{key} is {fields[key]}, but the model at init_from has {other}: omit it.")


def _set_drop_path(model: UniTok, rate: float) -> None:
    """Give every block the rate of a model that is built with `rate`; options of a part may override it."""
    model.config.drop_path_rate = rate
    with torch.device("meta"):
        like = UniTok(UniTokConfig.from_dict(model.config.to_dict()))
    for name, stack in like.named_modules():
        if isinstance(stack, Transformer):
            found: Any = model.get_submodule(name)
            found.drop_path_rate = stack.drop_path_rate
            for block, other in zip(found, stack, strict=True):
                block.drop_path_rate = other.drop_path_rate


def _with_image_size(model: UniTok, image_size: int) -> UniTok:
    """The model for training images of another size.

    Raises:
        UserError: a size of its weights, its scales or its token layout depends on the image size.
    """
    new = UniTok(UniTokConfig.from_dict({**model.config.to_dict(), "image_size": image_size}))
    state = model.state_dict()
    check_weights_fit("The model at init_from", state, new.state_dict(), f"model.image_size = {image_size}")
    new.load_state_dict(state)
    return new


def _load_pretrained(path: str, encoder_options: Mapping[str, Any]) -> UniTok:
    """The tokenizer of a folder (an MLLM's too), shipped model or hub id, with fp32 weights and more options.

    Raises:
        UserError: there is no model.
    """
    path = str(tokenizer_path(path))
    if not Path(path).exists() and path.count("/") != 1:  # a hub id is owner/name
        raise UserError(f"init_from is {path}, but there is no such folder or file.")
    try:
        return UniTok.from_pretrained(path, dtype=torch.float32, encoder_options={**encoder_options})
    except OSError as error:
        raise UserError(f"init_from: no model at {path} ({' '.join(str(error).split())[:200]}).") from error


def _has_vocabulary(model: UniTok, config: TokenizerRunConfig, captions: CaptionTokenizer) -> bool:
    """Whether the text tower of `model`, loaded from `init_from`, was trained with the ids of `captions`."""
    folder = tokenizer_path(config.init_from or "")
    if (folder / CAPTION_TOKENIZER_FOLDER).is_dir():
        return CaptionTokenizer.from_model_folder(folder).fingerprint == captions.fingerprint
    # published checkpoints hold no caption tokenizer
    return model.config.text_vocab_size == captions.vocab_size


def _with_new_text_tower(model: UniTok, config: TokenizerRunConfig, captions: CaptionTokenizer) -> UniTok:
    """The model with a random text tower for the ids of `captions`; all other weights are kept.

    Raises:
        UserError: the text tower is to be frozen.
    """
    if "text_encoder" in config.freeze:
        raise UserError(
            f"freeze holds text_encoder, but caption_tokenizer ({config.caption_tokenizer}) has other ids "
            "than the model at init_from, whose text tower cannot read them."
        )
    if distributed.is_main():
        print("The text tower starts anew: caption_tokenizer has other ids than the model at init_from.")
    fields = {**model.config.to_dict(), "text_vocab_size": captions.vocab_size}
    torch.manual_seed(seeding.derive_seed(config.seed, "model"))
    new = UniTok(UniTokConfig.from_dict(fields))
    kept = {name: w for name, w in model.state_dict().items() if not name.startswith("text_encoder.")}
    new.load_state_dict(kept, strict=False)
    return new


def _init_from_clip(model: UniTok, path: str) -> None:
    """Load image and text tower from an open_clip ViTamin checkpoint, which has no last norm.

    Raises:
        UserError: there is no checkpoint, its sizes differ, or it lacks weights of either tower.
    """
    source = "https://huggingface.co/jienengchen/ViTamin-L-256px"
    file = find_weights(path, CLIP_FILES, "init_from_clip (an open_clip ViTamin)", source)
    weights, missing = read_clip_weights(file, model.state_dict())
    missing = [name for name in missing if not name.startswith("encoder.norm.")]
    if missing:
        raise UserError(
            f"init_from_clip: {file} lacks {len(missing)} weights of the image and text towers "
            f"({missing[0]}, ...): they would stay random."
        )
    model.load_state_dict(weights, strict=False)
