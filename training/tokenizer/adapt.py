"""Stage `adapt`: a continuous autoencoder with LoRA and a new quantiser (CODA, arXiv 2503.17760, section 3).

The loop is that of the tokenizer stage.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from open_unitok.core import distributed
from open_unitok.core.errors import UserError, did_you_mean
from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.tokenizer.adaptation.folders import load_weights, read_autoencoder
from open_unitok.tokenizer.adaptation.lora import (
    inject_lora,
    merged_weights,
    read_adapter,
    save_adapter,
    up_weight,
)
from open_unitok.tokenizer.quantizers.published import load_quantizer

from ..data import seeding
from .adapt_config import AdaptRunConfig
from .model import recompute_activations, set_up_quantizer

# what a run may choose; other fields are the autoencoder's
FREE_FIELDS = (
    "quantizer",
    "quantizer_options",
    "num_codebooks",
    "codebook_size",
    "codebook_dim",
    "image_size",
    "token_layout",
)


@dataclasses.dataclass
class Adaptation:
    """What the loop needs to know about an adapted model beside the model.

    Attributes:
        base, sha256: path and digest of the autoencoder.
        layers: names of the layers with LoRA.
    """

    base: str
    sha256: str
    layers: list[str]
    adaptive_at: str | None
    save: Literal["merged", "adapter"]

    def last_weight(self, model: nn.Module) -> Tensor:
        """The `up` matrix at which the adaptive GAN weight compares gradients: nothing else trains there."""
        decoder = [name for name in self.layers if name.startswith("decoder.")]
        return up_weight(model, self.adaptive_at or decoder[-1])

    def write(self, path: Path, model: UniTok, final: bool) -> None:
        """Write a model folder; a checkpoint has the merged weights and the adapter, to resume averages."""
        if self.save == "merged" or not final:
            model.save_pretrained(path, state_dict=merged_weights(model))
        else:
            model.config.save_pretrained(path)
        if self.save == "adapter" or not final:
            save_adapter(path, model, self.base, self.sha256)

    def read_averages(self, checkpoint: Path) -> dict[str, Tensor]:
        """Averaged weights of a checkpoint by the names of the model's parameters."""
        lora = (".lora_A.", ".lora_B.")
        found = read_adapter(checkpoint)
        for kind in lora:
            found = {name.replace(kind, f"{kind}default."): tensor for name, tensor in found.items()}
        return found


def adapted_config(base: dict[str, Any], model: dict[str, Any]) -> UniTokConfig:
    """The config of the tokenizer: the autoencoder's fields, with the run's quantiser.

    Args:
        base: fields of UniTokConfig; model: the section of the run's config.

    Raises:
        UserError: an unknown field, or one that differs from the autoencoder's; latents of another width.
    """
    known = set(UniTokConfig().to_dict()) - {"model_type", "transformers_version"}
    for key, value in model.items():
        if key not in known:
            raise UserError(f"Unknown config key 'model.{key}'.{did_you_mean(key, known)}")
        if key not in FREE_FIELDS:
            _check_repeated(f"model.{key}", value, base.get(key, getattr(UniTokConfig(), key)))
    if model.get("quantizer") in (None, "none"):
        raise UserError(
            f"model.quantizer is {model.get('quantizer')!r}: stage adapt needs a quantiser with codes, e.g. "
            "attention or residual."
        )
    latents = base["codebook_dim"]
    chosen = {key: value for key, value in model.items() if key in FREE_FIELDS}
    config = UniTokConfig(**{**base, "quantizer_options": None, "num_codebooks": 1, **chosen})
    if config.latent_dim != latents:
        raise UserError(
            f"model.num_codebooks x codebook_dim is {config.latent_dim}, but the autoencoder's latents have "
            f"width {latents}."
        )
    return config


def build_adapted(config: AdaptRunConfig) -> tuple[UniTok, Adaptation]:
    """The autoencoder at `init_from` with LoRA, frozen, and a new quantiser.

    Raises:
        UserError: there is no continuous autoencoder, or the quantiser does not fit it; peft or diffusers is
            missing.
    """
    base = read_autoencoder(str(config.init_from), UniTok, config.model.get("encoder_options"))
    sizes = adapted_config(base.fields, config.model)
    torch.manual_seed(seeding.derive_seed(config.seed, "model"))
    model = UniTok(sizes)
    load_weights(model, base)
    if config.init_quantizer:
        load_quantizer(model.quantizer, model.config, config.init_quantizer)
    set_posterior(model, config.posterior)
    layers = freeze_but_lora(model, config)
    set_up_quantizer(model, config)
    if config.engine.gradient_checkpointing:
        recompute_activations(model, config.recompute)
    adaptation = Adaptation(base.path, base.sha256, layers, config.lora.adaptive_at, config.save)
    if config.losses.adversarial and config.discriminator.adaptive is not None:
        _check_adaptive(adaptation)
    if distributed.is_main():
        print(f"LoRA of rank {config.lora.rank} on {len(layers)} layers of {base.path}")
    return model, adaptation


def freeze_but_lora(model: UniTok, config: AdaptRunConfig) -> list[str]:
    """Add LoRA; nothing but LoRA and the quantiser's trainable parameters gets a gradient.

    Returns:
        The names of the layers with LoRA.
    """
    trained = [parameter for parameter in model.quantizer.parameters() if parameter.requires_grad]
    # its own seed: LoRA does not depend on how the model was created
    torch.manual_seed(seeding.derive_seed(config.seed, "lora"))
    layers = inject_lora(model, config.lora.modules, config.lora.rank)
    for parameter in trained:
        parameter.requires_grad_(True)
    return layers


def set_posterior(model: UniTok, posterior: str) -> None:
    """Let training quantise a sample in place of the mode.

    Raises:
        UserError: the encoder has no posterior.
    """
    if posterior == "mode":
        return
    if not hasattr(model.encoder, "samples_posterior"):
        raise UserError(
            f"posterior is {posterior}, but of encoder {model.config.encoder!r} only the mode is kept: set "
            "it to mode."
        )
    model.encoder.samples_posterior = True


def _check_adaptive(adaptation: Adaptation) -> None:
    """
    Raises:
        UserError: no layer of the decoder has LoRA, or not the one of `lora.adaptive_at`.
    """
    decoder = [name for name in adaptation.layers if name.startswith("decoder.")]
    chosen = adaptation.adaptive_at
    if chosen is not None and chosen not in decoder:
        raise UserError(f"lora.adaptive_at is {chosen!r}, which has no LoRA.{did_you_mean(chosen, decoder)}")
    if not decoder:
        raise UserError(
            "discriminator.adaptive compares gradients at the decoder's last LoRA, but lora.modules picks no "
            "layer of the decoder: name one, or set discriminator.adaptive to null."
        )


def _check_repeated(key: str, value: Any, own: Any) -> None:
    """
    Raises:
        UserError: a field of the autoencoder, or one of its options, is given with another value.
    """
    if isinstance(value, dict) and isinstance(own, dict):
        for name, inner in value.items():
            _check_repeated(f"{key}.{name}", inner, own.get(name))
    elif value != (list(own) if isinstance(own, tuple) else own):
        raise UserError(f"{key} is {value}, but the autoencoder has {own}: leave it out.")
