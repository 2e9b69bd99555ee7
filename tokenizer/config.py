"""The configuration of a UniTok visual tokenizer, checked on construction (arXiv 2502.20321)."""

import difflib
import math
from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from open_unitok.core.errors import UserError, did_you_mean

from .entries import check_options
from .images import MAX_PIXELS
from .token_layout import TokenLayout

PROJECTIONS = ("attention", "linear", "tanh", "none")
CONTINUOUS = "none"  # the entry of QUANTIZERS without codes
GEOMETRY = ("x", "y", "rotation", "scale x", "scale y")  # of a Gaussian; the order of numbers and codes
SUMMED_QUANTIZERS = ("language", "gaussian")  # entries of QUANTIZERS with `sums_rows`

# Named sizes: changes to the defaults of `UniTokConfig`. The published UniTok is vitamin_large.
# The published vitamin_small has no decoder; ours mirrors the encoder's widths, as the other two do.
TOKENIZER_SIZES: dict[str, dict[str, Any]] = {
    "vitamin_small": {
        "stem_width": 64,
        "stage_widths": (64, 128),
        "hidden_size": 384,
        "num_hidden_layers": 14,
        "num_attention_heads": 6,
        "decoder_widths": (128, 64),
    },
    "vitamin_base": {
        "stem_width": 128,
        "stage_widths": (128, 256),
        "hidden_size": 768,
        "num_hidden_layers": 14,
        "num_attention_heads": 12,
        "decoder_widths": (256, 128),
    },
    "vitamin_large": {
        "stem_width": 160,
        "stage_widths": (160, 320),
        "hidden_size": 1024,
        "num_hidden_layers": 31,
        "num_attention_heads": 16,
        "decoder_widths": (320, 160),
    },
}


class UniTokConfig(PretrainedConfig):
    """All sizes of a `UniTok`; the defaults are the published UniTok (vitamin_large, 256 px, 8 x 4096).

    The flat fields apply to encoder and decoder; `encoder_options` and `decoder_options` override them for
    one of the two, or configure an encoder or decoder of another kind.

    Args:
        image_size: side of the square training images in pixels, a multiple of patch_size; with a
            `token_layout`, the longer side. The model accepts images of other sizes as well.
        patch_size: side of the image patch of one visual token in pixels; 16 for ViTamin.
        token_layout: {rows, columns, registers, tokens} of the training images' tokens, the last two
            optional; None = square. With `tokens` other image sizes are rejected.
        encoder, decoder: entries of `ENCODERS` and `DECODERS`; encoder_options, decoder_options: their
            keyword arguments.
        stem_width: channels of the convolutional stem.
        stage_widths, stage_depths: channels and blocks of the two convolutional stages (strides 4 and 8).
            The published triples, which end in (hidden_size, 1), are accepted as well.
        hidden_size, num_hidden_layers, num_attention_heads, mlp_ratio: the transformers of encoder and
            decoder.
        drop_path_rate: stochastic depth of the last block in training; the rate grows linearly from 0.
        num_register_tokens: learned tokens before the image tokens; they are quantised as well.
        decoder_widths, decoder_depths: channels and blocks of the two upsampling stages (strides 4 and 2).
        num_codebooks: K sub-codebooks.
        codebook_size, codebook_dim: V entries of width C, per sub-codebook. Without a quantiser ("none") C is
            the width of the latents; the other two are not read.
        quantizer: an entry of `QUANTIZERS`; quantizer_options: its keyword arguments.
        projection: "attention" (published), "linear" or "tanh" (linear, tanh, linear), between hidden size
            and code width, both ways; "none" where the two are equal.
        projection_heads: heads of the attention projections; None = hidden_size // (K*C), as published.
        projection_causal: a visual token attends only to itself and earlier ones in the projections.
        adapter_layers, adapter_heads: of a transformer for each sub-codebook between encoder and projection,
            which is then the sub-codebook's own (FQGAN: 6, 8); 0 layers = none.
        embed_dim: E, width of the joint image-text space; 0 = none, and no text tower.
        text_*: the CLIP text tower; text_context_length counts start and end of text.

    Raises:
        UserError: a value is not valid or contradicts another one; the message names the field.
    """

    model_type = "unitok"

    image_size: int = 256
    patch_size: int = 16
    token_layout: dict[str, int] | None = None
    encoder: str = "vitamin"
    encoder_options: dict[str, Any] | None = None
    decoder: str = "vitamin"
    decoder_options: dict[str, Any] | None = None
    stem_width: int = 160
    stage_widths: list[int] | tuple[int, ...] = (160, 320)
    stage_depths: list[int] | tuple[int, ...] = (2, 4)
    hidden_size: int = 1024
    num_hidden_layers: int = 31
    num_attention_heads: int = 16
    mlp_ratio: float | int = 2.0
    drop_path_rate: float | int = 0.0
    num_register_tokens: int = 0
    decoder_widths: list[int] | tuple[int, ...] = (320, 160)
    decoder_depths: list[int] | tuple[int, ...] = (4, 2)
    num_codebooks: int = 8
    codebook_size: int = 4096
    codebook_dim: int = 8
    quantizer: str = "multi_codebook"
    quantizer_options: dict[str, Any] | None = None
    projection: str = "attention"
    projection_heads: int | None = None
    projection_causal: bool = False
    adapter_layers: int = 0
    adapter_heads: int = 8
    embed_dim: int = 768
    text_hidden_size: int = 768
    text_num_layers: int = 12
    text_num_heads: int = 12
    text_vocab_size: int = 49408
    text_context_length: int = 77

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing, as `InstalledCode`."""

    def __post_init__(self, **kwargs: Any) -> None:
        # transformers keeps unknown keywords as attributes: a mistyped field would have no effect.
        for key in kwargs.keys() - {"model_type", "transformers_version"}:
            near = difflib.get_close_matches(key, self.__dataclass_fields__, n=1, cutoff=0.8)
            if near:
                raise UserError(f"UniTokConfig has no field {key!r}.{did_you_mean(key, near)}")
        self._check_types()
        # Before the checks: they expect pairs, and config.json stores pairs.
        self.stage_widths = _pair(self.stage_widths, last=self.hidden_size)
        self.stage_depths = _pair(self.stage_depths, last=1)
        self.decoder_widths = _pair(self.decoder_widths, first=self.hidden_size)
        self.decoder_depths = _pair(self.decoder_depths)
        self._check()
        self._check_layout()
        super().__post_init__(**kwargs)

    def _check_types(self) -> None:
        """Raise UserError for values that are not numbers, before they are compared."""
        for name in (*_POSITIVE, *_COUNTS):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise UserError(f"{name} = {value!r}: expected a whole number.")
        for name in ("mlp_ratio", "drop_path_rate"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UserError(f"{name} = {value!r}: expected a number.")
        for name in ("stage_widths", "stage_depths", "decoder_widths", "decoder_depths"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or not all(type(count) is int for count in value):
                raise UserError(f"{name} = {value!r}: expected two whole numbers, one per stage.")

    def _check(self) -> None:
        """Raise UserError for values that would fail, or be misread, when the model is built."""
        for part in ("encoder", "decoder", "quantizer"):
            name, options = getattr(self, part), getattr(self, f"{part}_options")
            if not isinstance(name, str):
                raise UserError(f"{part} is {name!r}: expected a name.")
            if options is not None and not isinstance(options, dict):
                raise UserError(f"{part}_options is {options!r}: expected options by name, {{name: value}}.")
        for name in ("stage_widths", "stage_depths", "decoder_widths", "decoder_depths"):
            value = getattr(self, name)
            if len(value) != 2 or min(value) < 1:
                raise UserError(f"{name} = {value}: expected two positive numbers, one per stage.")
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least 1.")
        if self.image_size % self.patch_size:
            raise UserError(
                f"image_size = {self.image_size} is not a multiple of patch_size = {self.patch_size}."
            )
        for name in _COUNTS:
            if getattr(self, name) < 0:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least 0.")
        if self.adapter_layers and self.projection_causal:
            raise UserError(
                f"adapter_layers = {self.adapter_layers} with projection_causal: adapters attend to all "
                "tokens, set one of them to 0 or false."
            )
        if not 0 < self.mlp_ratio < math.inf:
            raise UserError(f"mlp_ratio = {self.mlp_ratio}: must be above 0.")
        if not 0 <= self.drop_path_rate < 1:
            raise UserError(f"drop_path_rate = {self.drop_path_rate}: must be in [0, 1).")
        if self.projection not in PROJECTIONS:
            raise UserError(f"projection = {self.projection!r}." + did_you_mean(self.projection, PROJECTIONS))
        # Attention splits the width into heads of equal size.
        for width, heads in (("hidden_size", "num_attention_heads"), ("text_hidden_size", "text_num_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise UserError(
                    f"{width} = {getattr(self, width)} is not a multiple of {heads} = {getattr(self, heads)}."
                )
        # The attention of a projection runs at the larger of its two widths.
        widest = max(self.decoder_width, self.latent_dim)
        if self.projection == "attention" and widest % self.num_projection_heads:
            raise UserError(
                f"The projection between hidden_size = {self.decoder_width} and num_codebooks x codebook_dim "
                f"= {self.latent_dim} would have {self.num_projection_heads} heads, which do not divide "
                f"{widest}: set projection_heads to a divisor of {widest}."
            )

    def _check_layout(self) -> None:
        """Fill in `token_layout`; raise UserError where it contradicts other fields."""
        if self.image_size**2 > MAX_PIXELS:
            raise UserError(
                f"image_size = {self.image_size}: such images have more than {MAX_PIXELS:,} pixels, the most "
                "that are read."
            )
        if self.token_layout is None:
            self._check_scales()
            return
        # Registers may be given in either of the two fields; the stored config has them in both.
        layout = TokenLayout.from_config(self.token_layout, None, self.num_register_tokens)
        self.num_register_tokens = self.num_register_tokens or layout.registers
        if layout.registers != self.num_register_tokens:
            raise UserError(
                f"token_layout has {layout.registers} registers, but num_register_tokens = "
                f"{self.num_register_tokens}: they must be equal."
            )
        # image_size is redundant with the layout: a wrong one would resize images to another grid.
        longer = max(layout.grid) * self.patch_size
        if self.image_size != longer:
            raise UserError(
                f"image_size = {self.image_size} is not the longer side of {layout.rows} x {layout.columns} "
                f"tokens of {self.patch_size} pixels: set it to {longer}."
            )
        self.token_layout = layout.to_dict()
        self._check_scales()

    def _check_scales(self) -> None:
        """Raise UserError where the scales of a residual quantiser contradict other fields."""
        if self.quantizer != "residual":
            return
        scales, (height, width) = self.scales or [], self.image_shape
        given = scales or (self.quantizer_options or {}).get("scales") or []
        if height != width:
            side = self.patch_size * scales[-1] if scales else self.image_size
            raise UserError(f"scales need square images of {side} pixels; this one has {height} x {width}.")
        side = self.image_size // self.patch_size
        rising = all(isinstance(s, int) and s > last for last, s in zip([0, *scales], scales))
        if not rising or not scales or scales[-1] != side:
            raise UserError(
                f"scales = {given}: rising sides are needed, the last of them image_size // patch_size = "
                f"{side}."
            )
        own = {"num_register_tokens": self.num_register_tokens, "token_layout.tokens": self.layout.tokens}
        for name, value in own.items():
            if value:
                raise UserError(f"{name} = {value} together with scales: set one of them to 0 / null.")

    def part_sizes(self, part: str, fields: Sequence[str], more: Sequence[str] = ()) -> dict[str, Any]:
        """`fields` of `part`, "encoder" or "decoder": the flat ones, overridden by `<part>_options`.

        Args:
            more: options that have no flat field.

        Raises:
            UserError: an option is not allowed; the width is not a multiple of the number of heads.
        """
        options = getattr(self, f"{part}_options") or {}
        check_options(part, getattr(self, part), options, [*fields, *more])
        sizes = {name: getattr(self, name) for name in fields} | options
        if sizes["hidden_size"] % sizes["num_attention_heads"]:
            raise UserError(
                f"{part}: hidden_size = {sizes['hidden_size']} is not a multiple of num_attention_heads = "
                f"{sizes['num_attention_heads']}."
            )
        return sizes

    @property
    def layout(self) -> TokenLayout:
        """The layout of the visual tokens of a training image."""
        if self.token_layout is not None:
            return TokenLayout(**self.token_layout)
        side = self.image_size // self.patch_size
        return TokenLayout(side, side, self.num_register_tokens)

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) of a training image in pixels."""
        return self.layout.rows * self.patch_size, self.layout.columns * self.patch_size

    @property
    def latent_dim(self) -> int:
        """Width of a visual token's latent: K*C, its K rows concatenated, or C where they are added."""
        one = self.sums_rows or self.quantizer == CONTINUOUS
        return self.codebook_dim if one else self.num_codebooks * self.codebook_dim

    @property
    def sums_rows(self) -> bool:
        """As `Quantizer.sums_rows`, before the quantiser is built."""
        residual = (self.quantizer_options or {}).get("kind") == "ResidualVQ"
        return self.quantizer in SUMMED_QUANTIZERS or (self.quantizer == "library" and residual)

    @property
    def decoder_width(self) -> int:
        """Width of the hidden states that decoder and image head share."""
        if self.projection == "none":
            return self.latent_dim
        options = self.decoder_options or {}
        return options.get("hidden_size", options.get("latent_channels", self.hidden_size))

    @property
    def num_projection_heads(self) -> int:
        """Heads of the attention projection to `decoder_width`."""
        return self.projection_heads_for(self.decoder_width)

    def projection_heads_for(self, width: int) -> int:
        """Heads of the attention projection between `width` and K*C: `projection_heads`, or the published
        rule."""
        return self.projection_heads or max(width // self.latent_dim, 1)

    @property
    def visual_sizes(self) -> dict[str, int]:
        """Width and heads of the causal projection of an MLLM over this tokenizer.

        Without an up projection, the width is the flat `hidden_size`: latents alone may be very narrow.
        """
        if self.projection == "none":
            return {"visual_hidden_size": self.hidden_size, "projection_heads": self.num_attention_heads}
        return {"visual_hidden_size": self.decoder_width, "projection_heads": self.num_projection_heads}

    @property
    def num_visual_tokens(self) -> int:
        """N of a training image, register tokens included; with scales, the sum over them."""
        return sum(side * side for side in self.scales) if self.scales else self.layout.num_tokens

    @property
    def scales(self) -> list[int] | None:
        """Sides of the grids of a residual quantiser, from coarse to fine; None = one grid."""
        scales = (self.quantizer_options or {}).get("scales")
        return list(scales) if isinstance(scales, list | tuple) and scales else None

    @property
    def bits_per_token(self) -> float:
        """Bits per visual token: the sum of log2(V) over its codes; 0 without codes.

        Of an own quantiser with codes of unequal size only `Quantizer.bits_per_token` knows it.
        """
        options, sizes = self.quantizer_options or {}, [self.codebook_size] * self.num_codebooks
        if self.quantizer == CONTINUOUS:
            return 0.0
        if self.quantizer == "language":
            adjectives, nouns = (options.get(name) or self.codebook_size for name in ("adjectives", "nouns"))
            sizes = [adjectives, adjectives, nouns]
        if self.quantizer == "gaussian":  # geometry has codes of its own, or five float32
            levels = options.get("levels")
            count = len(GEOMETRY)
            sizes = [*sizes[:-count], *levels] if levels else [*sizes, *[2**32] * count]
        return sum(map(math.log2, sizes))

    @classmethod
    def named(cls, name: str, **changes: Any) -> "UniTokConfig":
        """The config of a named size (see `TOKENIZER_SIZES`), with changes.

        Raises:
            UserError: there is no such size.
        """
        if name not in TOKENIZER_SIZES:
            raise UserError(f"{name!r} is not a tokenizer size." + did_you_mean(name, TOKENIZER_SIZES))
        return cls(**{**TOKENIZER_SIZES[name], **changes})


_POSITIVE = (
    "image_size",
    "patch_size",
    "stem_width",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_codebooks",
    "codebook_size",
    "codebook_dim",
    "adapter_heads",
    "text_hidden_size",
    "text_num_layers",
    "text_num_heads",
    "text_vocab_size",
    "text_context_length",
)
_COUNTS = ("num_register_tokens", "adapter_layers", "embed_dim")  # 0 = none


def _pair(values: Sequence[int], first: int | None = None, last: int | None = None) -> list[int]:
    """`values` as a list of two, as stored in JSON; of a published triple the number that another field holds
    is dropped."""
    values = list(values)
    # (320, 160) or, published, (1024, 320, 160) for the decoder and (160, 320, 1024) for the encoder
    if len(values) == 3 and first is not None and values[0] == first:
        return values[1:]
    if len(values) == 3 and last is not None and values[-1] == last:
        return values[:-1]
    return values
