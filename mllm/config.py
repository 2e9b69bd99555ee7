"""The configuration of a unified MLLM: a decoder over text tokens and image codes (arXiv 2502.20321, section
3.4)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from open_unitok.core.errors import UserError, did_you_mean
from open_unitok.tokenizer.config import UniTokConfig
from open_unitok.tokenizer.quantizers import Quantizer, describe_quantizer
from open_unitok.tokenizer.token_layout import TokenLayout

from .depth_config import DepthOptions, depth_config
from .features import VISUAL_INPUTS, FeatureOptions, feature_fields
from .output import NOT_PREDICTIONS

# The published placeholder id. It is outside the vocabulary: no text tokenizer produces it.
IMAGE_TOKEN_ID = -200
FEATURE_TOKEN_ID = -201  # the same for continuous features
IGNORED = -100  # label of a token that is no target; the default ignore_index of cross_entropy
VISUAL_CONTEXTS = ("full", "last")
ROW_NORMS = ("unit", "blocks", "none")
INPUT_EMBEDDERS = ("projection", "mlp", "tables")
VISUAL_POSITIONS = ("none", "learned_2d")

# fields that config.json leaves out at these values
_OMITTED: dict[str, Any] = {
    "depth_options": None,
    "input_embedder": "projection",
    "visual_positions": "none",
    "text_z_loss_weight": 0.0,
    "visual_input": "discrete",
    "feature_token_id": FEATURE_TOKEN_ID,
    **dict.fromkeys(("features", "num_continuous_tokens", "continuous_dim", "sep_token_id")),
    "features_fingerprint": None,
}

# Named sizes. The published 7B is a LLaMA-2-7B over the published UniTok's codes.
MLLM_SIZES: dict[str, dict[str, Any]] = {
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
    """All sizes of a `UniTokForConditionalGeneration`; all defaults but the decoder's are the published ones.

    Args:
        text_config: the decoder: a transformers config, or a dict with its `model_type` (default "llama").
        depth_config: the LLaMA layers of the depth head: a `LlamaConfig`, or a dict of the fields that
            differ from the decoder's; 3 layers by default.
        depth_options: variants of the depth head, see `DepthOptions`; None = UniTok's.
        input_embedder: how codes become input vectors: "projection" = UniTok's causal attention projection of
            frozen rows and an MLP; "mlp" = the rows through Linear-GELU-Linear alone, as TokenFlow reads
            them; "tables" = K trained tables, concatenated, through one linear layer, as FQGAN's decoder.
        num_codebooks, codebook_size, codebook_dim: K sub-codebooks of V entries of width C.
        code_sizes: entries of each sub-codebook, V or fewer; None = V each.
        sums_rows: whether a visual vector is made from the sum of the K rows, as in the tokenizer's
            quantiser, instead of their concatenation.
        row_norm, row_blocks: normalisation of codebook rows before the projection, the same as in the
            tokenizer's quantiser: "unit" norm, unit norm of each of the "blocks" of a row (`row_blocks`: the
            number of equal ones, or a list of their widths), "none".
        visual_hidden_size: width of the causal projection; must equal the tokenizer's decoder width to
            initialise the projection from the tokenizer.
        projection_heads: its heads; None = visual_hidden_size // (K*C), as in the tokenizer.
        num_image_tokens: N of a generated image. Images in prompts may have another N.
        scales: sides of the grids of a pyramid's codes; None = one grid. The sum of all scales is read, as
            `num_image_tokens` vectors; such images cannot be generated.
        token_layout: see `TokenLayout`, of a generated image's tokens; None = square.
        visual_context: the codes that a visual vector depends on during generation: "full" = all earlier ones
            of its image, as in training; "last" = only its own, as in the published sampler.
        visual_positions: what is added to a visual vector for its place in the image: "none" as published,
            "learned_2d" = a trained vector per row and one per column of `token_layout` (none to registers),
            for images that are read and generated; all images then have `num_image_tokens` tokens.
        image_z_loss_weight: weight of the mean squared largest logit, added to the image's cross entropy.
        text_z_loss_weight: weight of the mean squared log-sum-exp, added to the text's cross entropy (as
            UniToken, 1e-5).
        visual_input: how an image that is read enters: by its codes, by continuous features, or by both,
            codes first. Images that are generated are codes in all three.
        features: the features' source and adapter, see `FeatureOptions`; only with continuous or dual input.
        num_continuous_tokens, continuous_dim: M features of width F per image that is read.
        sep_token_id: text id between codes and features (`features.separator`); it is never a target.
        feature_token_id: placeholder of features in `input_ids`, outside the vocabulary.
        features_fingerprint: of all that determines the features, or None.
        image_token_id: placeholder of visual tokens in `input_ids`, and in `labels` of target images; it is
            outside the vocabulary, so text logits equal those of the plain decoder.
        boi_token_id, eoi_token_id: begin and end of a generated image.
        pad_token_id: id of padding; only the attention mask determines which positions are padding.
        unitok_fingerprint: of the visual tokenizer whose codes the model was trained on, or None.
        vocabulary_fingerprint: of the text tokenizer (see `UniTokProcessor`); None in folders of earlier
            versions.

    Raises:
        UserError: a value is not valid or contradicts another one; the message names the field.
    """

    model_type = "unitok_mllm"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig, "depth_config": LlamaConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = NOT_PREDICTIONS

    text_config: Any = None  # dict, config or None as an argument; a PretrainedConfig after construction
    depth_config: Any = None  # the same; a LlamaConfig after construction
    depth_options: dict[str, Any] | None = None
    input_embedder: Literal["projection", "mlp", "tables"] | str = "projection"
    num_codebooks: int = 8
    codebook_size: int = 4096
    codebook_dim: int = 8
    code_sizes: list[int] | None = None
    sums_rows: bool = False
    row_norm: Literal["unit", "blocks", "none"] | str = "unit"
    row_blocks: int | list[int] = 1
    visual_hidden_size: int = 1024
    projection_heads: int | None = None
    num_image_tokens: int = 256
    token_layout: dict[str, int] | None = None
    scales: list[int] | None = None
    visual_context: Literal["full", "last"] | str = "full"
    visual_positions: Literal["none", "learned_2d"] | str = "none"
    image_z_loss_weight: float | int = 5e-5
    text_z_loss_weight: float | int = 0.0
    visual_input: Literal["discrete", "continuous", "dual"] | str = "discrete"
    features: dict[str, Any] | None = None
    num_continuous_tokens: int | None = None
    continuous_dim: int | None = None
    sep_token_id: int | None = None
    feature_token_id: int = FEATURE_TOKEN_ID
    features_fingerprint: str | None = None
    image_token_id: int = IMAGE_TOKEN_ID
    boi_token_id: int = 3
    eoi_token_id: int = 4
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    unitok_fingerprint: str | None = None
    vocabulary_fingerprint: str | None = None
    tie_word_embeddings: bool = False

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing, as `InstalledCode`."""

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = _decoder_config(self.text_config)
        self.depth_config = depth_config(self.depth_config, self.text_config)
        # transformers' `generate` reads these from the outer config
        for name in ("bos_token_id", "eos_token_id"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(self.text_config, name, None))
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        self._check()
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """All fields but those of `_OMITTED` at their defaults, which older folders do not have either."""
        fields = super().to_dict()
        return {key: v for key, v in fields.items() if key not in _OMITTED or v != _OMITTED[key]}

    def _check(self) -> None:
        """Raise UserError for values that would fail, or be misread, when the model is built."""
        for name in (
            "num_codebooks",
            "codebook_size",
            "codebook_dim",
            "visual_hidden_size",
            "num_image_tokens",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least 1.")
        choices = {
            "visual_context": VISUAL_CONTEXTS,
            "row_norm": ROW_NORMS,
            "input_embedder": INPUT_EMBEDDERS,
            "visual_input": VISUAL_INPUTS,
            "visual_positions": VISUAL_POSITIONS,
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise UserError(f"{name} = {value!r}." + did_you_mean(value, allowed))
        options = DepthOptions.from_config(self.depth_options)
        options.check(self.depth_config, self.text_config.hidden_size, self.input_embedder)
        self.depth_options = options.changes()  # published heads keep their config.json
        self._check_row_blocks()
        self._check_code_sizes()
        self._check_features()
        if self.scales is not None and self.scales[-1] ** 2 != self.num_image_tokens:
            raise UserError(
                f"scales = {self.scales}: num_image_tokens must be the square of the last one, not "
                f"{self.num_image_tokens}."
            )
        if self.scales is not None and self.input_embedder == "tables":
            raise UserError(
                f"input_embedder = 'tables' has one vector per code, and the scales {self.scales} are read "
                "as a sum of rows: use 'mlp' or 'projection'."
            )
        if self.visual_positions != "none":
            self.check_places()
        if self.token_layout is not None:
            self.token_layout = TokenLayout.from_config(self.token_layout, self.num_image_tokens).to_dict()
        # The attention of the projection runs at the larger of its two widths.
        widest = max(self.visual_hidden_size, self.latent_dim)
        if self.input_embedder == "projection" and widest % self.num_projection_heads:
            raise UserError(
                f"The projection between num_codebooks x codebook_dim = {self.latent_dim} and "
                f"visual_hidden_size = {self.visual_hidden_size} would have {self.num_projection_heads} "
                f"heads, which do not divide {widest}: set projection_heads to a divisor of {widest}."
            )
        # labels hold all of these ids, so they must differ
        if self.image_token_id in (self.boi_token_id, self.eoi_token_id, IGNORED):
            raise UserError(
                f"image_token_id = {self.image_token_id} is also boi, eoi or the ignored label: choose "
                "another number."
            )

    def check_places(self) -> None:
        """
        Raises:
            UserError: `visual_positions` without a grid of visual tokens.
        """
        layout = TokenLayout.from_config(self.token_layout, self.num_image_tokens)
        reason = "codes of a pyramid" if self.scales else "a set of tokens" if layout.tokens else None
        if reason:
            raise UserError(
                f"visual_positions = {self.visual_positions!r} needs visual tokens on a grid, and this model "
                f"has {reason}: omit the key."
            )

    def _check_row_blocks(self) -> None:
        blocks, width = self.row_blocks, self.codebook_dim
        if not isinstance(blocks, int):
            if min(blocks, default=0) < 1 or sum(blocks) != width:
                raise UserError(
                    f"row_blocks = {list(blocks)}: expected widths of 1 or more whose sum is codebook_dim = "
                    f"{width}."
                )
        elif blocks < 1:
            raise UserError(f"row_blocks = {blocks}: must be at least 1.")
        elif width % blocks:
            raise UserError(f"row_blocks = {blocks} does not divide codebook_dim = {width}.")

    def _check_code_sizes(self) -> None:
        if self.code_sizes is None:
            return
        sizes = self.code_sizes = list(self.code_sizes)
        if len(sizes) != self.num_codebooks or min(sizes) < 1 or max(sizes) != self.codebook_size:
            raise UserError(
                f"code_sizes = {sizes}: expected num_codebooks = {self.num_codebooks} sizes, the largest of "
                f"them codebook_size = {self.codebook_size}."
            )
        if len(set(sizes)) == 1:
            self.code_sizes = None

    def _check_features(self) -> None:
        sizes = ("num_continuous_tokens", "continuous_dim")
        if self.visual_input == "discrete":
            for name in ("features", *sizes, "sep_token_id", "features_fingerprint"):
                if getattr(self, name) is not None:
                    raise UserError(
                        f"{name} is set, but visual_input = 'discrete' reads no features: set it to "
                        "'continuous' or 'dual'."
                    )
            return
        options = FeatureOptions.from_config(self.features, self.visual_input)
        self.features = options.to_dict()
        if self.visual_input == "dual" and self.scales:
            raise UserError(
                f"visual_input = 'dual' with codes of a pyramid (scales {self.scales}): take a tokenizer "
                "without scales, or visual_input = 'continuous'."
            )
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(
                    f"{name} = {value} with visual_input = {self.visual_input!r}: must be a whole number >= "
                    "1 (UniTokMLLMConfig.for_tokenizer sets it)."
                )
        if options.separator != (self.sep_token_id is not None):
            raise UserError(
                f"features.separator = {options.separator}, but sep_token_id = {self.sep_token_id}: give the "
                "processor's sep_token_id exactly if there is a separator."
            )
        others = (self.image_token_id, self.boi_token_id, self.eoi_token_id, self.sep_token_id, IGNORED)
        if self.feature_token_id in others:
            raise UserError(
                f"feature_token_id = {self.feature_token_id} has another meaning: choose another."
            )

    @property
    def depth(self) -> DepthOptions:
        """The variant of the depth head."""
        return DepthOptions.from_config(self.depth_options)

    @property
    def num_codes(self) -> int:
        """Visual tokens of an image's codes: `num_image_tokens`, or with scales the sum over them."""
        return sum(side * side for side in self.scales) if self.scales else self.num_image_tokens

    def num_read(self, num_codes: int) -> int:
        """The number of code vectors, and of their placeholders, of an image with this many visual tokens."""
        return self.num_image_tokens if self.scales else num_codes

    @property
    def read_length(self) -> int:
        """Tokens of an image that is read: its codes, a separator, its features."""
        codes = 0 if self.visual_input == "continuous" else self.num_image_tokens
        return codes + (self.sep_token_id is not None) + (self.num_continuous_tokens or 0)

    def check_generates(self) -> None:
        """
        Raises:
            UserError: the codes of the visual tokenizer cannot be generated.
        """
        if self.scales:
            raise UserError(
                f"This visual tokenizer codes an image as a pyramid (scales {self.scales}, {self.num_codes} "
                "tokens); the MLLM reads it, but generates one grid: take a tokenizer without scales."
            )

    @property
    def book_sizes(self) -> list[int]:
        """Entries of each of the K sub-codebooks."""
        return self.code_sizes or [self.codebook_size] * self.num_codebooks

    @property
    def latent_dim(self) -> int:
        """Width of a visual token's latent: K*C, its K rows concatenated, or C where they are added."""
        return self.codebook_dim if self.sums_rows else self.num_codebooks * self.codebook_dim

    @property
    def num_projection_heads(self) -> int:
        """Heads of the causal projection: `projection_heads`, or the published rule."""
        return self.projection_heads or max(self.visual_hidden_size // self.latent_dim, 1)

    @property
    def context_length(self) -> int | None:
        """The decoder's context in tokens, visual ones included; None if its config has no limit."""
        return getattr(self.text_config, "max_position_embeddings", None)

    @classmethod
    def named(cls, name: str, **changes: Any) -> UniTokMLLMConfig:
        """The config of a named size (see `MLLM_SIZES`), with changes.

        Raises:
            UserError: there is no such size.
        """
        if name not in MLLM_SIZES:
            raise UserError(f"{name!r} is not an MLLM size." + did_you_mean(name, MLLM_SIZES))
        return cls(**{**MLLM_SIZES[name], **changes})

    @classmethod
    def for_tokenizer(cls, unitok: UniTokConfig, **fields: Any) -> UniTokMLLMConfig:
        """A config with the visual sizes of a tokenizer; `fields` are the other fields (text_config, ...).

        Raises:
            UserError: an MLLM cannot read or generate the tokenizer's codes.
        """
        quantizer = describe_quantizer(unitok)  # its options may change how rows are normalised
        check_mllm_quantizer(unitok.quantizer, quantizer)
        visual = {name: getattr(unitok, name) for name in ("num_codebooks", "codebook_size", "codebook_dim")}
        visual |= unitok.visual_sizes
        visual |= {
            "token_layout": unitok.token_layout,
            "num_image_tokens": quantizer.num_embedded(unitok.layout),
            "scales": unitok.scales,
        }
        for name in ("row_norm", "row_blocks", "code_sizes", "sums_rows"):
            visual[name] = getattr(quantizer, name)
        return cls(**{**visual, **feature_fields(unitok, fields), **fields})


def check_mllm_quantizer(name: str, quantizer: Quantizer | type[Quantizer]) -> None:
    """
    Raises:
        UserError: an MLLM cannot read the quantiser's codes, or cannot generate them.
    """
    if not quantizer.discrete:
        raise UserError(quantizer.no_codes)
    if not quantizer.reads:
        raise UserError(f"The codes of quantizer = {name!r} cannot be read by an MLLM (Quantizer.reads).")
    # an MLLM may be asked for images; that of a pyramid refuses then (check_generates)
    if not quantizer.generates and not hasattr(quantizer, "scales"):
        raise UserError(
            f"The codes of quantizer = {name!r} cannot be generated by an MLLM (Quantizer.generates)."
        )


def _decoder_config(config: dict[str, Any] | PretrainedConfig | None) -> PretrainedConfig:
    if isinstance(config, PretrainedConfig):
        return config
    fields = dict(config or {})
    kind = fields.pop("model_type", "llama")  # LLaMA is the published decoder
    try:
        return AutoConfig.for_model(kind, **fields)
    except ValueError as error:
        raise UserError(
            f"text_config.model_type = {kind!r} is not a decoder of transformers: {str(error)[:100]}"
        ) from error
