"""The sizes of a unified MLLM: a decoder over text tokens and image codes (arXiv 2502.20321, section 3.4)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from open_unitok.core.errors import UserError, did_you_mean
from open_unitok.tokenizer.config import UniTokConfig

# A placeholder is no entry of the vocabulary: the published number, which no text tokenizer gives out.
IMAGE_TOKEN_ID = -200
VISUAL_CONTEXTS = ("full", "last")

# What the depth head takes over from the decoder unless `depth_config` says otherwise.
_SHARED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "initializer_range",
    "rope_parameters",
)

# Named sizes. The published 7B is a LLaMA-2-7B with the published UniTok's codes; its config.json was not at
# hand, so the decoder's sizes are those of LLaMA-2-7B.
SIZES: dict[str, dict[str, Any]] = {
    "unitok_mllm_7b": {
        "text_config": {
            "model_type": "llama",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "depth_config": {"num_hidden_layers": 3},
    },
}


class UniTokMLLMConfig(PretrainedConfig):
    """Every size of a `UniTokForConditionalGeneration`; but for the decoder the defaults are the published.

    Args:
        text_config: the decoder: a config of transformers, or a dict with its `model_type` ("llama" if none).
        depth_config: the LLaMA layers of the depth head: a `LlamaConfig`, or a dict of the fields that
            differ from the decoder's widths; 3 layers if it does not say.
        num_codebooks, codebook_size, codebook_dim: K sub-codebooks of V entries of width C.
        visual_hidden_size: width of the causal projection; the tokenizer's hidden size, if it starts from
            there.
        projection_heads: its heads; None = visual_hidden_size // (K*C), as in the tokenizer.
        num_image_tokens: N of a drawn image. Read images may have other numbers.
        visual_context: what a visual vector knows while an image is drawn: "full" = all earlier codes of its
            image, as in training; "last" = its own codes alone, as the published sampler had it.
        image_z_loss_weight: weight of the mean squared largest logit, beside the image's cross entropy.
        image_token_id: marks an image's places in `input_ids`, and in `labels` that the image is learnt; not
            an entry of the vocabulary, so that text logits stay those of the plain decoder.
        boi_token_id, eoi_token_id: stand before and after a drawn image. pad_token_id: fills rows up; which
            places are filled is said by the attention mask alone.
        unitok_fingerprint: of the visual tokenizer whose codes the model was trained on, or None.

    Raises:
        UserError: a value that no model can be built from; the message names the field.
    """

    model_type = "unitok_mllm"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig, "depth_config": LlamaConfig}

    text_config: Any = None  # a dict, a config or None when given; a PretrainedConfig ever after
    depth_config: Any = None  # likewise; a LlamaConfig ever after
    num_codebooks: int = 8
    codebook_size: int = 4096
    codebook_dim: int = 8
    visual_hidden_size: int = 1024
    projection_heads: int | None = None
    num_image_tokens: int = 256
    token_layout: dict[str, int] | None = None
    visual_context: Literal["full", "last"] | str = "full"
    image_z_loss_weight: float | int = 5e-5
    image_token_id: int = IMAGE_TOKEN_ID
    boi_token_id: int = 3
    eoi_token_id: int = 4
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    unitok_fingerprint: str | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = _decoder_config(self.text_config)
        self.depth_config = _depth_config(self.depth_config, self.text_config)
        for name in ("bos_token_id", "eos_token_id"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(self.text_config, name, None))
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        self._check()
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        """Raise UserError for what would fail, or mean something else, when the model is built."""
        for name in (
            "num_codebooks",
            "codebook_size",
            "codebook_dim",
            "visual_hidden_size",
            "num_image_tokens",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: at least 1 is needed.")
        if self.visual_context not in VISUAL_CONTEXTS:
            raise UserError(
                f"visual_context = {self.visual_context!r}."
                + did_you_mean(self.visual_context, VISUAL_CONTEXTS)
            )
        widest = max(self.visual_hidden_size, self.latent_dim)
        if widest % self.num_projection_heads:
            raise UserError(
                f"The projection between num_codebooks x codebook_dim = {self.latent_dim} and "
                f"visual_hidden_size = {self.visual_hidden_size} would have {self.num_projection_heads} "
                f"heads, which do not divide {widest}: set projection_heads to a divisor of {widest}."
            )
        if self.image_token_id in (self.boi_token_id, self.eoi_token_id, -100):
            raise UserError(
                f"image_token_id = {self.image_token_id} also means boi, eoi or an ignored label: "
                "pick another number."
            )

    @property
    def latent_dim(self) -> int:
        """K*C, the width of all sub-codes of a visual token side by side."""
        return self.num_codebooks * self.codebook_dim

    @property
    def num_projection_heads(self) -> int:
        """Heads of the causal projection: `projection_heads`, or the published rule."""
        return self.projection_heads or max(self.visual_hidden_size // self.latent_dim, 1)

    @property
    def context_length(self) -> int | None:
        """The decoder's context, in tokens (visual ones included); None where its config names none."""
        return getattr(self.text_config, "max_position_embeddings", None)

    @classmethod
    def named(cls, name: str, **changes: Any) -> UniTokMLLMConfig:
        """The config of a named size with some fields changed.

        Raises:
            UserError: there is no such size.
        """
        if name not in SIZES:
            raise UserError(f"There is no MLLM size {name!r}." + did_you_mean(name, SIZES))
        return cls(**{**SIZES[name], **changes})

    @classmethod
    def for_tokenizer(cls, unitok: UniTokConfig, **fields: Any) -> UniTokMLLMConfig:
        """A config whose visual side fits a visual tokenizer; `fields` are the others (text_config, ...)."""
        visual = {name: getattr(unitok, name) for name in ("num_codebooks", "codebook_size", "codebook_dim")}
        visual["visual_hidden_size"] = unitok.decoder_width
        visual["projection_heads"] = unitok.num_projection_heads
        return cls(**{**visual, "num_image_tokens": unitok.num_visual_tokens, **fields})


def _decoder_config(config: dict[str, Any] | PretrainedConfig | None) -> PretrainedConfig:
    if isinstance(config, PretrainedConfig):
        return config
    fields = dict(config or {})
    kind = fields.pop("model_type", "llama")
    try:
        return AutoConfig.for_model(kind, **fields)
    except ValueError as error:
        raise UserError(
            f"text_config.model_type = {kind!r} is no decoder that transformers knows: {error}"
        ) from error


def _depth_config(config: dict[str, Any] | PretrainedConfig | None, text: PretrainedConfig) -> LlamaConfig:
    """Fill up what `config` leaves out with the decoder's widths, and with what the decoder has no say in."""
    if isinstance(config, LlamaConfig):
        return config
    fields = config.to_dict() if isinstance(config, PretrainedConfig) else dict(config or {})
    fields.pop("model_type", None)
    shared = {name: getattr(text, name, None) for name in _SHARED}
    if not isinstance(shared["rope_parameters"], dict) or "rope_theta" not in shared["rope_parameters"]:
        shared["rope_parameters"] = None  # some families keep one set per kind of layer
    shared["hidden_act"] = shared["hidden_act"] or getattr(text, "hidden_activation", None) or "silu"
    if fields.keys() & {"hidden_size", "num_attention_heads"}:  # then these follow from the new widths
        shared["head_dim"] = shared["num_key_value_heads"] = None
        if "num_attention_heads" not in fields and fields["hidden_size"] % (
            shared["num_attention_heads"] or 1
        ):
            raise UserError(
                f"depth_config.hidden_size = {fields['hidden_size']} is not a multiple of the decoder's "
                f"{shared['num_attention_heads']} heads: set depth_config.num_attention_heads too."
            )
    own = {"num_hidden_layers": 3, "vocab_size": 1, "bos_token_id": None, "eos_token_id": None}
    filled = {**own, **{name: value for name, value in shared.items() if value is not None}, **fields}
    return LlamaConfig(**filled)
