"""Config of the stage `adapt`, which makes a discrete tokenizer of a continuous autoencoder (CODA, arXiv
2503.17760); imports no torch."""

import dataclasses
from typing import ClassVar, Literal

from open_unitok.core.errors import UserError

from .config import TokenizerRunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAOptions:
    """LoRA on layers of encoder and decoder, with alpha = rank and a start that changes nothing.

    Attributes:
        modules: parts of the full names of convolutions and linear layers (CODA: conv1 and conv2 of the FLUX
            VAE, also upsample and downsample of MAR's).
        adaptive_at: name of the layer at whose `up` matrix discriminator.adaptive compares gradients; null =
            the last one of the decoder.
    """

    rank: int = 32
    modules: list[str] = dataclasses.field(default_factory=lambda: ["conv1", "conv2"])
    adaptive_at: str | None = None

    def check(self) -> None:
        if self.rank < 1:
            raise UserError(f"lora.rank is {self.rank}: it must be 1 or more.")
        if not self.modules or not all(self.modules):
            raise UserError(f"lora.modules is {self.modules}: name parts of the layers' names, e.g. conv1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptRunConfig(TokenizerRunConfig):
    """A run of the stage `adapt`: the autoencoder at `init_from` is frozen but for LoRA; a quantiser learns.

    `init_from` is a diffusers AutoencoderKL (folder, hub id, or a pipeline with one in vae/), a single file
    of one in LDM's layout, or a UniTok that was trained with quantizer: none. `model` names the quantiser;
    sizes of the autoencoder may be repeated. A single file needs model.encoder_options.scaling_factor.

    Attributes:
        posterior: what is quantised: the mode, or in training a sample (published; AutoencoderKL only). Codes
            are those of the mode.
        save: OUT/model is "merged", or an "adapter" beside the autoencoder, which it needs when it is loaded.
        ema_start: until this step the averages are copies of the weights.
        ema_pace: steps per update in the rule for the decay, min(ema, (1 + u) / (10 + u)).
    """

    init_from_has_quantizer: ClassVar[bool] = False

    lora: LoRAOptions = dataclasses.field(default_factory=LoRAOptions)
    posterior: Literal["mode", "sample"] = "mode"
    save: Literal["merged", "adapter"] = "merged"
    ema_start: int = 0
    ema_pace: int = 1

    def check(self) -> None:
        if not self.init_from:
            raise UserError(
                "init_from is not set: stage adapt needs a trained continuous autoencoder, a diffusers "
                "AutoencoderKL or a UniTok trained with quantizer: none."
            )
        if self.losses.clip:
            raise UserError(
                f"losses.clip is {self.losses.clip}, but stage adapt has no captions: set losses.clip to 0."
            )
        super().check()
        if self.freeze:
            raise UserError(
                f"freeze is {self.freeze}: stage adapt freezes the autoencoder and trains LoRA and the "
                "quantiser: leave it out."
            )
        if self.words.lists:
            raise UserError("words: stage adapt has no language codebooks: leave the section out.")
        if self.ema_start < 0 or self.ema_pace < 1:
            raise UserError("ema_start must be 0 or more, ema_pace 1 or more.")
