"""The config of the MLLM stage: data mixture, loss, model, learning rate per part.

Pretraining and fine-tuning are the same loop with other configs. No torch is imported.
"""

import dataclasses
from typing import Any, ClassVar, Literal

from open_unitok.core.errors import UserError, did_you_mean

from ..core.options import RunConfig
from ..data.mixture_options import MixtureOptions
from ..data.sample_kinds import SAMPLE_KINDS

# part of the model -> prefix of its parameters' names; the longest matching prefix applies
MODEL_PARTS = {
    "language_model": "language_model.",
    "lm_head": "lm_head.",
    "visual_embedder": "visual_embedder.",
    "projection": "visual_embedder.projection.",
    "projector": "visual_embedder.projector.",
    "feature_adapter": "feature_adapter.",  # of models with continuous or dual visual input
    "depth_head": "depth_head.",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossOptions:
    """How text and image loss are combined; each weight has the name of its loss.

    weighting "tokens" (published): (image * sum over codes + text * sum over text tokens) / (image * codes +
    text * text tokens), so every code counts as one token. "means": image * mean over codes + text * mean
    over text tokens. Sums and counts are over all ranks and the whole accumulation.
    """

    weighting: Literal["tokens", "means"] = "tokens"
    # weights, by the names in `UniTokMLLMOutput.losses`; text None = the model has no text loss
    text: float | None = 1.0
    image: float = 1.0

    def check(self) -> None:
        if self.text is None or self.text < 0 or self.image < 0 or self.text + self.image == 0:
            raise UserError("loss.text and loss.image must be 0 or more, and not both 0.")

    def by_name(self) -> dict[str, float]:
        """The weight of every loss."""
        weights = dataclasses.asdict(self)
        del weights["weighting"]
        return {name: weight for name, weight in weights.items() if weight is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """A new model: a visual tokenizer, a text tokenizer, and a decoder from sizes or from a folder.

    unitok: folder of the visual tokenizer, or of an MLLM that has one. text_tokenizer: sentencepiece
        `tokenizer.model` or a folder. A shipped model's name is a folder here and in `language_model`.
    language_model: folder or hub id of a trained decoder, or of an MLLM, whose decoder is taken; else `text`
        (fields of its config) sets its sizes.
    depth: fields of the depth head's config. fields: further fields of UniTokMLLMConfig.
    processor: further arguments of UniTokProcessor (template, legacy, ...).
    """

    section_keys: ClassVar[dict[str, tuple[str, ...]]] = {
        "model.fields": ("visual_input", "features", "depth_options", "input_embedder")
    }

    unitok: str
    text_tokenizer: str
    language_model: str | None = None
    text: dict[str, Any] = dataclasses.field(default_factory=dict)
    depth: dict[str, Any] = dataclasses.field(default_factory=dict)
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    processor: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Low-rank adapters (peft) on every linear layer of `parts`; all other weights are frozen.

    The run then writes an adapter: OUT/model holds adapter_config.json and adapter_model.safetensors.
    base: dtype of the frozen weights; bf16 halves their memory and requires engine.dtype bf16.
    dropout: of the adapters' input; sampled per rank, so a run then depends on the number of ranks.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    parts: tuple[str, ...] = ("language_model", "depth_head")
    base: Literal["fp32", "bf16"] = "fp32"

    def check(self) -> None:
        if self.rank < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise UserError("lora: rank must be 1 or more, alpha above 0, dropout 0 or more and below 1.")
        for part in self.parts:
            if part not in MODEL_PARTS:
                hint = did_you_mean(part, MODEL_PARTS)
                raise UserError(f"lora.parts: {part!r} is not a part of the model.{hint}")
        if not self.parts:
            raise UserError(f"lora.parts is empty: give at least one of {', '.join(MODEL_PARTS)}.")


def check_conditioner(data: MixtureOptions, conditioner: str) -> None:
    """
    Raises:
        UserError: a kind of sample is not one of this conditioner.
    """
    own = [name for name, kind in SAMPLE_KINDS.items() if kind.conditioner == conditioner]
    for entry in data.mixture:
        if entry.kind not in own:
            raise UserError(
                f"data.mixture: kind {entry.kind} needs conditioner: {SAMPLE_KINDS[entry.kind].conditioner}; "
                f"with {conditioner} a kind is one of {', '.join(own)}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLLMRunConfig(RunConfig):
    """The MLLM stage, with either `model` (pretraining) or `init_from` (fine-tuning an MLLM folder).

    conditioner: what images are generated from; with "class" the config is a `ClassRunConfig`.
    lr_factors: part -> factor on the learning rate; 0 freezes it. The sub-codebooks are always frozen.
    visual_positions: "learned_2d" adds vectors of rows and columns to the model of `init_from` and trains
        them with the learning rate of visual_embedder; null, or a model that has them: the model keeps what
        it has. A new model has them by model.fields.visual_positions.
    lora: train adapters on the model of `init_from` instead of its weights.
    attention: of the decoder, by transformers' names, or "varlen": within each sample of a row, without a
        mask. "auto" = flash_attention_2 where it can run, else varlen on a GPU and for rows of 512 or more
        packed tokens, else sdpa.
    residual: dtype of the sums over the layers of decoder and depth head. bf16, with engine.dtype bf16,
        halves what checkpointing keeps, at the precision of a model whose weights are bf16.
    """

    conditioner: Literal["prompt"] = "prompt"
    data: MixtureOptions
    loss: LossOptions = LossOptions()
    model: ModelOptions | None = None
    visual_positions: Literal["learned_2d"] | None = None
    lr_factors: dict[str, float] = dataclasses.field(default_factory=dict)
    lora: LoraOptions | None = None
    attention: Literal["auto", "varlen", "sdpa", "eager", "flash_attention_2"] = "auto"
    residual: Literal["fp32", "bf16"] = "fp32"

    def check(self) -> None:
        super().check()
        if (self.model is None) == (self.init_from is None):
            raise UserError(
                "Give either `model` (build a new MLLM) or `init_from` (train an existing MLLM folder), not "
                f"{'both' if self.model else 'neither'}."
            )
        check_conditioner(self.data, self.conditioner)
        self.data.check_replay(self.init_from)
        for part, factor in self.lr_factors.items():
            if part not in MODEL_PARTS:
                hint = did_you_mean(part, MODEL_PARTS)
                raise UserError(f"lr_factors.{part}: {part!r} is not a part of the model.{hint}")
            if factor < 0:
                raise UserError(f"lr_factors.{part} is {factor}, must be 0 (frozen) or more.")
        # by prefix: a part inside another one may have its own factor
        if all(self.lr_factor(prefix) == 0 for prefix in MODEL_PARTS.values()):
            raise UserError("lr_factors freeze every part: nothing is left to train.")
        if self.visual_positions:
            self._check_visual_positions()
        if self.lora and self.model:
            raise UserError("lora needs a trained base model: give `init_from` instead of `model`.")
        # without autocast, fp32 activations and bf16 weights would meet in every frozen linear layer
        if self.lora and self.lora.base == "bf16" and self.engine.dtype == "fp32":
            raise UserError("lora.base is bf16, but engine.dtype fp32: set engine.dtype to bf16.")
        if self.residual == "bf16" and self.engine.dtype != "bf16":
            raise UserError(
                f"residual is bf16, but engine.dtype {self.engine.dtype}: set engine.dtype to bf16."
            )
        if self.attention == "flash_attention_2" and self.engine.dtype == "fp32":
            raise UserError(
                "attention: flash_attention_2 needs bf16, but engine.dtype is fp32: set engine.dtype to "
                "bf16, or attention to sdpa."
            )
        if self.lora and all(self.lr_factor(MODEL_PARTS[part]) == 0 for part in self.lora.parts):
            raise UserError("lr_factors freeze every part that lora.parts names: nothing is left to train.")

    def _check_visual_positions(self) -> None:
        """Raise UserError for a run that has no trained model to add vectors to, or would not train them."""
        if self.model:
            raise UserError(
                "visual_positions adds vectors to the model of init_from; a new model has them by "
                "model.fields.visual_positions."
            )
        if self.lora:
            raise UserError(
                "visual_positions adds vectors, which an adapter does not hold: train them first in a run "
                "without lora, then give that model as init_from."
            )
        if self.lr_factor(MODEL_PARTS["visual_embedder"]) == 0:
            raise UserError(
                "visual_positions adds vectors, which lr_factors.visual_embedder = 0 would freeze: set it "
                "above 0."
            )

    def lr_factor(self, name: str) -> float:
        """The factor for a parameter's name: that of the smallest part that contains it."""
        return next((factor for prefix, factor in self.prefix_factors() if name.startswith(prefix)), 1.0)

    def prefix_factors(self) -> list[tuple[str, float]]:
        """(prefix of parameters' names, factor), the longest prefix first."""
        pairs = [(MODEL_PARTS[part], factor) for part, factor in self.lr_factors.items()]
        return sorted(pairs, key=lambda pair: -len(pair[0]))
