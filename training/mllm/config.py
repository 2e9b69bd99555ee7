"""What a YAML of the MLLM stage may say: data mixture, loss, model, learning rate per part.

Pretraining and fine-tuning are the same loop; they differ by what stands here. No torch is imported.
"""

import dataclasses
from typing import Any, Literal

from open_unitok.core.errors import UserError, did_you_mean

from ..core.options import RunConfig

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
class MixtureEntry:
    """A data set in a role; `weight` is its share.

    path: a code folder; for text a .txt or .jsonl file or a glob of them; for conversation and alignment also
    LLaVA's .json or .jsonl, whose images are looked up by name in the code folder `codes`. A document's
    texts and images are learnt, of kind reading its texts alone.
    """

    kind: Literal["text_to_image", "captioning", "conversation", "alignment", "text", "document", "reading"]
    path: str
    weight: float = 1.0
    codes: str | None = None

    def check(self) -> None:
        if not self.weight > 0:
            raise UserError(
                f"data.mixture: weight of {self.kind} from {self.path} is {self.weight}: above 0 is wanted."
            )
        file = self.path.endswith((".json", ".jsonl"))
        if file and self.kind not in ("conversation", "alignment", "text"):
            raise UserError(
                f"data.mixture: {self.path} is no code folder, as kind {self.kind} needs: see `unitok data "
                "convert` and `unitok extract-codes`."
            )
        if self.codes and (not file or self.kind == "text"):
            raise UserError(
                f"data.mixture: codes = {self.codes} belongs to conversations in a .json or .jsonl."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureOptions:
    """The data; the defaults are published UniTok's.

    unconditional: share of text_to_image samples whose prompt is dropped, for classifier-free guidance.
    short_captions: share of samples with the short caption where there is a long one too.
    text_to_image_share: of an entry text_to_image, the rest is captioned. max_length: longest sample in
    tokens, visual ones included. pack_to: rows of this many tokens hold as many samples as fit, without
    attending to each other; 0 = one sample per row. group_by_length: micro-batches of one step hold samples
    of similar length (every rank then builds all samples of a step). workers: processes per rank that
    prefetch steps, 0 = none; it changes no batch and may differ on resume.
    """

    mixture: list[MixtureEntry]
    unconditional: float = 0.1
    short_captions: float = 0.2
    text_to_image_share: float = 1.0
    max_length: int = 2048
    pack_to: int = 0
    group_by_length: bool = False
    workers: int = 0
    max_bad_share: float = 0.05

    def check(self) -> None:
        if not self.mixture:
            raise UserError("data.mixture is empty: name at least one {kind, path, weight}.")
        for name in ("unconditional", "short_captions", "text_to_image_share", "max_bad_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"data.{name} is {getattr(self, name)}: a share between 0 and 1 is wanted.")
        if self.max_length < 2 or self.pack_to < 0 or self.workers < 0:
            raise UserError(
                "data.max_length is 2 or more, data.pack_to and data.workers are 0 (none) or more."
            )


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
