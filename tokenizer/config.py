"""The sizes of a UniTok visual tokenizer, checked when they are written down (arXiv 2502.20321)."""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from transformers import PretrainedConfig

from open_unitok.core.errors import UserError, did_you_mean

PROJECTIONS = ("attention", "linear")
Entry = TypeVar("Entry")

# Named sizes: what differs from the defaults of `UniTokConfig`. The published UniTok is vitamin_large.
# The published vitamin_small has no decoder; ours follows the other two: the encoder's widths, backwards.
SIZES: dict[str, dict[str, Any]] = {
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
    """Every size of a `UniTok`; the defaults are the published UniTok (vitamin_large, 256 px, 8 x 4096).

    Args:
        image_size: side of the square training images in pixels, a multiple of 16; other sizes run too.
        stem_width: channels of the convolutional stem.
        stage_widths, stage_depths: channels and blocks of the two convolutional stages (strides 4 and 8).
            The published triples, which end in (hidden_size, 1), are taken as well.
        hidden_size, num_hidden_layers, num_attention_heads, mlp_ratio: the transformers of both halves.
        drop_path_rate: stochastic depth of the last block, in training; it grows linearly from 0.
        num_register_tokens: learnt tokens in front of the image's; they are quantised and coded too.
        decoder_widths, decoder_depths: channels and blocks of the two upsampling stages (strides 4 and 2).
        num_codebooks: K sub-codebooks.
        codebook_size, codebook_dim: V entries of width C, per sub-codebook.
        quantizer: an entry of `QUANTIZERS`; quantizer_options: its own keyword arguments.
        projection: "attention" (published) or "linear", between hidden size and code width, both ways.
        projection_heads: heads of the attention projections; None = hidden_size // (K*C), as published.
        projection_causal: a visual token sees only earlier ones in the projections.
        embed_dim: E, width of the joint image-text space.
        text_*: the CLIP text tower; text_context_length counts start and end of text.

    Raises:
        UserError: a value that no model can be built from; the message names the field.
    """

    model_type = "unitok"
    patch_size: ClassVar[int] = 16  # the product of the convolutional strides, not a choice

    image_size: int = 256
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
    embed_dim: int = 768
    text_hidden_size: int = 768
    text_num_layers: int = 12
    text_num_heads: int = 12
    text_vocab_size: int = 49408
    text_context_length: int = 77

    def __post_init__(self, **kwargs: Any) -> None:
        for key in kwargs.keys() - {"model_type", "transformers_version"}:
            near = difflib.get_close_matches(key, self.__dataclass_fields__, n=1, cutoff=0.8)
            if near:
                raise UserError(f"UniTokConfig has no field {key!r}.{did_you_mean(key, near)}")
        self.stage_widths = _pair(self.stage_widths, last=self.hidden_size)
        self.stage_depths = _pair(self.stage_depths, last=1)
        self.decoder_widths = _pair(self.decoder_widths, first=self.hidden_size)
        self.decoder_depths = _pair(self.decoder_depths)
        self._check()
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        """Raise UserError for what would fail, or mean something else, when the model is built."""
        for name in ("stage_widths", "stage_depths", "decoder_widths", "decoder_depths"):
            value = getattr(self, name)
            if len(value) != 2 or min(value) < 1:
                raise UserError(f"{name} = {value}: two positive numbers are needed, one per stage.")
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: at least 1 is needed.")
        if self.image_size % self.patch_size:
            raise UserError(f"image_size = {self.image_size} is not a multiple of {self.patch_size}.")
        if self.num_register_tokens < 0:
            raise UserError(f"num_register_tokens = {self.num_register_tokens}: 0 or more are needed.")
        if not 0 <= self.drop_path_rate < 1:
            raise UserError(f"drop_path_rate = {self.drop_path_rate}: 0 <= rate < 1 is needed.")
        if self.projection not in PROJECTIONS:
            raise UserError(f"projection = {self.projection!r}." + did_you_mean(self.projection, PROJECTIONS))
        for width, heads in (("hidden_size", "num_attention_heads"), ("text_hidden_size", "text_num_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise UserError(
                    f"{width} = {getattr(self, width)} is not a multiple of {heads} = {getattr(self, heads)}."
                )
        widest = max(self.hidden_size, self.latent_dim)
        if self.projection == "attention" and widest % self.num_projection_heads:
            raise UserError(
                f"The projection between hidden_size = {self.hidden_size} and num_codebooks x codebook_dim = "
                f"{self.latent_dim} would have {self.num_projection_heads} heads, which do not divide "
                f"{widest}: set projection_heads to a divisor of {widest}."
            )

    @property
    def latent_dim(self) -> int:
        """K*C, the width of all sub-codes of a visual token side by side."""
        return self.num_codebooks * self.codebook_dim

    @property
    def num_projection_heads(self) -> int:
        """Heads of the attention projections: `projection_heads`, or the published hidden_size // (K*C)."""
        return self.projection_heads or max(self.hidden_size // self.latent_dim, 1)

    @property
    def num_visual_tokens(self) -> int:
        """N of an image of `image_size`, register tokens included."""
        return (self.image_size // self.patch_size) ** 2 + self.num_register_tokens

    @property
    def bits_per_token(self) -> float:
        """Information that one visual token can carry."""
        return self.num_codebooks * math.log2(self.codebook_size)

    @classmethod
    def named(cls, name: str, **changes: Any) -> "UniTokConfig":
        """The config of a named size (see `SIZES`) with some fields changed.

        Raises:
            UserError: there is no such size.
        """
        if name not in SIZES:
            raise UserError(f"There is no tokenizer size {name!r}." + did_you_mean(name, SIZES))
        return cls(**{**SIZES[name], **changes})


_POSITIVE = (
    "image_size",
    "stem_width",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_codebooks",
    "codebook_size",
    "codebook_dim",
    "embed_dim",
    "text_hidden_size",
    "text_num_layers",
    "text_num_heads",
    "text_vocab_size",
    "text_context_length",
)


def entry_of(table: Mapping[str, Entry], table_name: str, field: str, name: str) -> Entry:
    """The entry of a seam's table that a config field names.

    Raises:
        UserError: there is none; the message names the table.
    """
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UserError(f"{field} {name!r} is not known: {table_name} has {', '.join(table)}.{hint}")


def check_options(field: str, name: str, options: Mapping[str, Any], allowed: Sequence[str]) -> None:
    """
    Raises:
        UserError: `options` holds a key that the entry `name` of a seam does not take.
    """
    for key in options:
        if key not in allowed:
            hint = did_you_mean(key, allowed) if allowed else " It takes none."
            raise UserError(f"{field}_options.{key} is not an option of {field} {name!r}.{hint}")


def _pair(values: Sequence[int], first: int | None = None, last: int | None = None) -> list[int]:
    """A list (as JSON has it); of a published triple only the two numbers that no other field says."""
    values = list(values)
    if len(values) == 3 and first is not None and values[0] == first:
        return values[1:]
    if len(values) == 3 and last is not None and values[-1] == last:
        return values[:-1]
    return values
