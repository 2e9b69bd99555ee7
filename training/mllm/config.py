"""What a YAML of the MLLM stage may say: data mixture, loss, model, learning rate per part.

Pretraining and fine-tuning are the same loop; they differ by what stands here. No torch is imported.
"""

import dataclasses
from typing import Any, Literal

from open_unitok.core.errors import UserError, did_you_mean

from ..core.options import RunConfig
from ..data.mixture_options import MixtureOptions

# part of the model -> what its parameters' names begin with; a part within a part counts before the whole
PARTS = {
    "language_model": "language_model.",
    "lm_head": "lm_head.",
    "visual_embedder": "visual_embedder.",
    "projection": "visual_embedder.projection.",
    "projector": "visual_embedder.projector.",
    "depth_head": "depth_head.",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossOptions:
    """How text and image loss are joined.

    weighting "tokens" (published): (image * sum over codes + text * sum over text tokens) / (image * codes +
    text * text tokens), so every code counts as one token. "means": image * mean over codes + text * mean
    over text tokens. Sums and counts are over all ranks and the whole accumulation.
    """

    weighting: Literal["tokens", "means"] = "tokens"
    text: float = 1.0
    image: float = 1.0

    def check(self) -> None:
        if self.text < 0 or self.image < 0 or self.text + self.image == 0:
            raise UserError("loss.text and loss.image are 0 or more, and not both 0.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """A new model: a visual tokenizer, a text tokenizer, and a decoder from sizes or from a folder.

    unitok: folder of the visual tokenizer. text_tokenizer: sentencepiece `tokenizer.model` or a folder.
    language_model: folder or hub id of a trained decoder; else `text` (fields of its config) says its sizes.
    depth: fields of the depth head's config. fields: further fields of UniTokMLLMConfig.
    processor: further arguments of UniTokProcessor (template, legacy, ...).
    """

    unitok: str
    text_tokenizer: str
    language_model: str | None = None
    text: dict[str, Any] = dataclasses.field(default_factory=dict)
    depth: dict[str, Any] = dataclasses.field(default_factory=dict)
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    processor: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Low-rank adapters (peft) on every linear layer of `parts`; all other weights stay as they are.

    The run then leaves an adapter: OUT/model holds adapter_config.json and adapter_model.safetensors.
    base: number format of the frozen weights; bf16 halves their memory and goes with engine.dtype bf16.
    dropout: of the adapters' input; it is drawn per rank, so that with it other ranks make another run.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    parts: tuple[str, ...] = ("language_model", "depth_head")
    base: Literal["fp32", "bf16"] = "fp32"

    def check(self) -> None:
        if self.rank < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise UserError("lora: rank is 1 or more, alpha above 0, dropout from 0 to below 1.")
        for part in self.parts:
            if part not in PARTS:
                raise UserError(f"lora.parts: there is no part {part!r}.{did_you_mean(part, PARTS)}")
        if not self.parts:
            raise UserError(f"lora.parts is empty: name at least one of {', '.join(PARTS)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLLMRunConfig(RunConfig):
    """The MLLM stage; either `model` (pretraining) or `init_from` (fine-tuning an MLLM folder) is given.

    lr_factors: part -> factor on the learning rate; 0 freezes it. The sub-codebooks are always frozen.
    lora: train adapters on the model of `init_from` instead of its weights.
    attention: of the decoder, as transformers names it; "auto" = flash_attention_2 where that can run.
    """

    data: MixtureOptions
    loss: LossOptions = LossOptions()
    model: ModelOptions | None = None
    lr_factors: dict[str, float] = dataclasses.field(default_factory=dict)
    lora: LoraOptions | None = None
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "sdpa"

    def check(self) -> None:
        super().check()
        if (self.model is None) == (self.init_from is None):
            raise UserError(
                "Give either `model` (build a new MLLM) or `init_from` (train an MLLM folder further), not "
                f"{'both' if self.model else 'neither'}."
            )
        for part, factor in self.lr_factors.items():
            if part not in PARTS:
                raise UserError(f"lr_factors.{part}: there is no such part.{did_you_mean(part, PARTS)}")
            if factor < 0:
                raise UserError(f"lr_factors.{part} is {factor}: 0 (frozen) or more is wanted.")
        if all(self.lr_factor(prefix) == 0 for prefix in PARTS.values()):
            raise UserError("lr_factors freeze every part: nothing is left to train.")
        if self.lora and self.model:
            raise UserError("lora needs a trained model to sit on: give `init_from` instead of `model`.")
        if self.lora and self.lora.base == "bf16" and self.engine.dtype == "fp32":
            raise UserError("lora.base is bf16, but engine.dtype fp32: set engine.dtype to bf16.")
        if self.lora and all(self.lr_factor(PARTS[part]) == 0 for part in self.lora.parts):
            raise UserError("lr_factors freeze every part that lora.parts names: nothing is left to train.")

    def lr_factor(self, name: str) -> float:
        """The factor for a parameter's name: that of the narrowest part it is in."""
        return next((factor for prefix, factor in self.prefix_factors() if name.startswith(prefix)), 1.0)

    def prefix_factors(self) -> list[tuple[str, float]]:
        """(beginning of parameters' names, factor), the narrowest part first."""
        pairs = [(PARTS[part], factor) for part, factor in self.lr_factors.items()]
        return sorted(pairs, key=lambda pair: -len(pair[0]))
