"""The models of a stage-1 run, as its config wants them to begin (arXiv 2502.20321, section 3.1 and 4.1)."""

from pathlib import Path
from typing import Any

import torch

from open_unitok.core.errors import UserError, did_you_mean
from open_unitok.core.files import tokenizer_path
from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.tokenizer.loading import find_weights

from ..core import deepspeed_engine
from ..data import seeding
from .config import TokenizerRunConfig
from .dead_codes import init_codebooks

CLIP_FILES = ("open_clip_pytorch_model.bin", "pytorch_model.bin", "open_clip_model.safetensors")


def caption_tokenizer(config: TokenizerRunConfig) -> Any:
    """The CLIP-style tokenizer of captions, or None where no contrast is learnt."""
    if not config.losses.clip or config.caption_tokenizer is None:
        return None
    from open_unitok.tokenizer.caption_tokenizer import CaptionTokenizer

    length = config.model.get("text_context_length", UniTokConfig().text_context_length)
    return CaptionTokenizer.from_path(config.caption_tokenizer, length)


def build_model(config: TokenizerRunConfig, captions: Any) -> UniTok:
    """A fresh tokenizer (weights drawn from `seed`), or the one at `init_from`, with frozen parts frozen.

    Raises:
        UserError: an unknown field of `model`, or one that differs from the model at `init_from`.
    """
    fields = dict(config.model)
    size = fields.pop("size", "vitamin_large")
    known = set(UniTokConfig().to_dict()) - {"model_type", "transformers_version"}
    for key in fields:
        if key not in known:
            raise UserError(f"Unknown config key 'model.{key}'.{did_you_mean(key, known)}")
    if captions is not None:
        fields.setdefault("text_vocab_size", captions.vocab_size)
    wanted = UniTokConfig.named(size, **fields)
    if captions is not None and wanted.text_vocab_size < captions.vocab_size:
        raise UserError(
            f"model.text_vocab_size is {wanted.text_vocab_size}, but {config.caption_tokenizer} has "
            f"{captions.vocab_size} ids: leave the key out."
        )
    if config.init_from is None:
        torch.manual_seed(seeding.derive_seed(config.seed, "model"))
        model = UniTok(wanted)
        if config.decoder_init == "kaiming":
            begin_decoder(model)
        if config.init_from_clip:
            begin_towers(model, config.init_from_clip)
    else:
        model = start_model(config.init_from)
        for key in fields:
            if getattr(model.config, key) != getattr(wanted, key):
                other = getattr(model.config, key)
                raise UserError(f"model.{key} is {fields[key]}, but the model at init_from has {other}.")
        if config.model:
            model.config.drop_path_rate = wanted.drop_path_rate
    for part in config.freeze:
        model.get_submodule(part).requires_grad_(False)
    if not config.losses.clip:  # without contrast these get no gradient, and must not decay
        for part in (model.text_encoder, model.image_norm, model.image_projection):
            part.requires_grad_(False)
        model.logit_scale.requires_grad_(False)
    if config.engine.gradient_checkpointing:
        deepspeed_engine.enable_activation_checkpointing(model)
    return model


def start_model(path: str) -> UniTok:
    """The tokenizer of a folder (an MLLM's too), shipped model or hub id, its weights in fp32.

    Raises:
        UserError: there is none.
    """
    path = str(tokenizer_path(path))
    if not Path(path).exists() and path.count("/") != 1:  # a hub id is owner/name
        raise UserError(f"init_from is {path}, but there is no such folder or file.")
    try:
        return UniTok.from_pretrained(path, dtype=torch.float32)
    except OSError as error:
        raise UserError(f"init_from: no model at {path} ({' '.join(str(error).split())[:200]}).") from error


def begin_towers(model: UniTok, path: str) -> None:
    """Image and text tower begin as those of an open_clip ViTamin checkpoint, which has no last norm.

    Raises:
        UserError: there is none, its sizes differ, or it lacks weights of either tower.
    """
    from open_unitok.tokenizer.convert import read_clip_weights

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


def begin_decoder(model: UniTok) -> None:
    """Begin the decoder's convolutions at unit gain (He et al., arXiv 1502.01852, equation 10).

    The published start counts the outputs of all groups, so depthwise kernels begin near zero and their
    blocks pass nothing on for hundreds of steps: harmless over a million steps, half of the demo's run.
    """
    for module in model.decoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


def build_lpips(config: TokenizerRunConfig, image_size: int, device: torch.device) -> Any:
    """The perceptual loss with its published weights, or None where its weight is 0.

    Raises:
        UserError: no such weights; images too small for its deepest features.
    """
    if not config.losses.lpips:
        return None
    from open_unitok.tokenizer.frozen.lpips import LPIPS, MIN_SIZE

    lpips = LPIPS.from_file(config.losses.lpips_weights).to(device)
    if image_size < MIN_SIZE:
        raise UserError(
            f"losses.lpips is {config.losses.lpips}, but on images of {image_size} pixels LPIPS sees next to "
            f"nothing (it needs {MIN_SIZE}): set losses.lpips to 0."
        )
    return lpips


@torch.no_grad()
def begin_codebooks(model: UniTok, pixels: torch.Tensor, seed: int) -> None:
    """Codebook entries become encoder outputs of (B, 3, S, S) pixels."""
    model.eval()
    latents = torch.cat([model.encode_latents(piece) for piece in pixels.split(64)])
    init_codebooks(model.quantizer.codebooks, latents.flatten(0, 1), seed)
