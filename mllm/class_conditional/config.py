"""The configuration of a class-conditional image model on a tokenizer's codes (LlamaGen, arXiv 2406.06525).

K sub-codebooks, V entries of each, D width.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from transformers import PretrainedConfig

from open_unitok.core.errors import UserError, did_you_mean
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.config import UniTokConfig
from open_unitok.tokenizer.quantizers import describe_quantizer
from open_unitok.tokenizer.token_layout import TokenLayout

from ..loading import CLASS_TYPE
from ..output import NOT_PREDICTIONS

_FFN_MULTIPLE = 256  # the published rule: 8D/3, rounded up to a multiple of this


def _size(layers: int, heads: int, width: int) -> dict[str, int]:
    return {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": width}


# LlamaGen's GPT-B to GPT-3B, and the XXXL of UniTok's fork
CLASS_CONDITIONAL_SIZES: dict[str, dict[str, int]] = {
    "B": _size(12, 12, 768),
    "L": _size(24, 16, 1024),
    "XL": _size(36, 20, 1280),
    "XXL": _size(48, 24, 1536),
    "XXXL": _size(48, 40, 2560),
    "3B": _size(24, 32, 3200),
}


class ClassConditionalConfig(PretrainedConfig):
    """All sizes of a `ClassConditionalModel`; the defaults are LlamaGen-B on the published UniTok's codes.

    Args:
        num_classes: classes are the integers below it.
        class_dropout: share of the training samples that see no class. Above 0 the class table has one more
            row, the null class `num_classes`, which guidance needs.
        intermediate_size: width of the SwiGLU; None = 8/3 of hidden_size, rounded up to a multiple of 256.
        depth_layers: blocks of the depth head; None = 4. With one sub-codebook there is no depth head: 0.
        num_codebooks, codebook_size, code_sizes: as in `UniTokMLLMConfig`.
        num_image_tokens, token_layout: N, and {rows, columns} of the grid; None = square.
        dropout: of the embedded sequence, and of the output of attention and SwiGLU in every block.
        attention_dropout: of the attention weights.
        drop_path: share of the samples for which the last block's branches are left out; it rises linearly
            from 0 at the first block. Takes the place of `dropout`.
        rope_base: base of the 2D rotary embedding's frequencies.
        unitok_fingerprint: of the visual tokenizer whose codes the model was trained on, or None.

    Raises:
        UserError: a value is not valid or contradicts another one; the message names the field.
    """

    model_type = CLASS_TYPE
    keys_to_ignore_at_inference: ClassVar[list[str]] = NOT_PREDICTIONS

    num_classes: int = 1000
    class_dropout: float | int = 0.1
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    depth_layers: int | None = None
    num_codebooks: int = 8
    codebook_size: int = 4096
    code_sizes: list[int] | None = None
    num_image_tokens: int = 256
    token_layout: dict[str, int] | None = None
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.0
    drop_path: float | int = 0.0
    rope_base: float | int = 10000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    unitok_fingerprint: str | None = None

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing, as `InstalledCode`."""

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_types()
        if self.intermediate_size is None:
            self.intermediate_size = -(-(8 * self.hidden_size // 3) // _FFN_MULTIPLE) * _FFN_MULTIPLE
        if self.depth_layers is None:
            self.depth_layers = 4 if self.num_codebooks > 1 else 0
        self._check()
        self._check_codes()
        super().__post_init__(**kwargs)

    def _check_types(self) -> None:
        # before any arithmetic; `type` because True is an int for isinstance
        whole = ("num_classes", "hidden_size", "num_hidden_layers", "num_attention_heads", "depth_layers")
        for name in (*whole, "intermediate_size", "num_codebooks", "codebook_size", "num_image_tokens"):
            value = getattr(self, name)
            derived = value is None and name in ("depth_layers", "intermediate_size")
            if type(value) is not int and not derived:
                raise UserError(f"{name} = {value!r}: must be a whole number.")
        for name in ("class_dropout", "dropout", "attention_dropout", "drop_path"):
            if type(getattr(self, name)) not in (int, float):
                raise UserError(f"{name} = {getattr(self, name)!r}: must be a number.")
        for name in ("rope_base", "rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise UserError(f"{name} = {value!r}: must be a number above 0.")
        sizes, grid = self.code_sizes, self.token_layout
        if sizes is not None and not (
            isinstance(sizes, (list, tuple)) and all(type(size) is int for size in sizes)
        ):
            raise UserError(f"code_sizes = {sizes!r}: must be a list of whole numbers.")
        if grid is not None and not isinstance(grid, dict):
            raise UserError(f"token_layout = {grid!r}: must be {{rows, columns}}.")

    def _check(self) -> None:
        counts = ("num_classes", "hidden_size", "num_hidden_layers", "num_attention_heads")
        for name in (*counts, "intermediate_size", "num_codebooks", "codebook_size", "num_image_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least 1.")
        for name in ("class_dropout", "dropout", "attention_dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: must be 0 or more and below 1.")
        # pairs of channels, half of them for the row and half for the column
        if self.hidden_size % (4 * self.num_attention_heads):
            raise UserError(
                f"hidden_size = {self.hidden_size} with num_attention_heads = {self.num_attention_heads}: "
                "the width of a head must be a multiple of 4, for the 2D rotary embedding."
            )
        if self.drop_path and (self.dropout or self.attention_dropout):
            raise UserError(
                f"drop_path = {self.drop_path} takes the place of the dropouts: set dropout and "
                "attention_dropout to 0."
            )

    def _check_codes(self) -> None:
        assert self.depth_layers is not None
        if (self.num_codebooks == 1) != (self.depth_layers == 0) or self.depth_layers < 0:
            allowed = "must be 0" if self.num_codebooks == 1 else "must be at least 1"
            raise UserError(
                f"depth_layers = {self.depth_layers} {allowed} with num_codebooks = {self.num_codebooks}."
            )
        if self.code_sizes is not None:
            sizes = self.code_sizes = list(self.code_sizes)
            if len(sizes) != self.num_codebooks or min(sizes) < 1 or max(sizes) != self.codebook_size:
                raise UserError(
                    f"code_sizes = {sizes}: expected num_codebooks = {self.num_codebooks} sizes, the largest "
                    f"of them codebook_size = {self.codebook_size}."
                )
            if len(set(sizes)) == 1:
                self.code_sizes = None
        layout = TokenLayout.from_config(self.token_layout, self.num_image_tokens)
        _check_grid(layout)
        if self.token_layout is not None:
            self.token_layout = layout.to_dict()

    @property
    def layout(self) -> TokenLayout:
        """The grid of an image's tokens."""
        return TokenLayout.from_config(self.token_layout, self.num_image_tokens)

    @property
    def null_class(self) -> int | None:
        """The class that stands for none; None if the model was trained without class dropout."""
        return self.num_classes if self.class_dropout > 0 else None

    @property
    def visual_input(self) -> str:
        """The model reads codes (`UniTokMLLMConfig` may read features)."""
        return "discrete"

    @property
    def num_continuous_tokens(self) -> int | None:
        """None: features are not read."""
        return None

    @property
    def book_sizes(self) -> list[int]:
        """Entries of each of the K sub-codebooks."""
        return self.code_sizes or [self.codebook_size] * self.num_codebooks

    @property
    def context_length(self) -> int | None:
        """None: the only sequence is a class and its image."""
        return None

    def check_generates(self) -> None:
        """Do nothing: all codes of such a model can be generated (`UniTokMLLMConfig` has pyramids)."""

    def num_read(self, num_codes: int) -> int:
        """The number of vectors of an image with this many visual tokens: the same."""
        return num_codes

    def check_class(self, value: Any) -> int:
        """
        Raises:
            UserError: not a class of this model.
        """
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < self.num_classes:
            raise UserError(f"class {value!r} is not valid: expected 0 to {self.num_classes - 1}.")
        return value

    def check_tokenizer(self, unitok: UniTok, source: Any) -> None:
        """Check that the model generates the codes of this tokenizer; errors name `source`.

        Raises:
            UserError: it was trained on those of another one, or on codes of other sizes.
        """
        wanted = self.for_tokenizer(unitok.config)
        for name in ("num_codebooks", "book_sizes", "num_image_tokens", "layout"):
            ours, theirs = getattr(self, name), getattr(wanted, name)
            if ours != theirs:
                raise UserError(
                    f"{source}: the model has {name} = {ours}, its visual tokenizer {theirs}: they differ."
                )
        expected = self.unitok_fingerprint
        if expected is not None and expected != (found := unitok.fingerprint()):
            raise UserError(
                f"{source}: the model was trained on the codes of tokenizer {expected[:12]}, but its visual "
                f"tokenizer is {found[:12]}: replace it with the tokenizer of training."
            )

    @classmethod
    def named(cls, name: str, **changes: Any) -> ClassConditionalConfig:
        """The config of a named size (see `CLASS_CONDITIONAL_SIZES`), with changes.

        Raises:
            UserError: there is no such size.
        """
        if name not in CLASS_CONDITIONAL_SIZES:
            raise UserError(
                f"{name!r} is not a class-conditional size." + did_you_mean(name, CLASS_CONDITIONAL_SIZES)
            )
        return cls(**{**CLASS_CONDITIONAL_SIZES[name], **changes})

    @classmethod
    def for_tokenizer(cls, unitok: UniTokConfig, **fields: Any) -> ClassConditionalConfig:
        """A config with the visual sizes of a tokenizer; `fields` are the other fields.

        Raises:
            UserError: the tokenizer's codes cannot be generated, or do not form one grid.
        """
        quantizer = describe_quantizer(unitok)
        if not quantizer.generates or unitok.scales:
            raise UserError(
                f"The codes of quantizer = {unitok.quantizer!r} cannot be generated as one grid: a "
                "class-conditional model needs a tokenizer without scales."
            )
        _check_grid(unitok.layout)
        visual = {
            "num_codebooks": unitok.num_codebooks,
            "codebook_size": unitok.codebook_size,
            "code_sizes": quantizer.code_sizes,
            "num_image_tokens": quantizer.num_embedded(unitok.layout),
            "token_layout": unitok.token_layout,
        }
        return cls(**{**visual, **fields})


def _check_grid(layout: TokenLayout) -> None:
    # a position of the 2D rotary embedding is a row and a column
    if layout.registers or layout.num_tokens != layout.rows * layout.columns:
        raise UserError(
            f"token_layout = {layout.to_dict()}: a class-conditional model places every token on a grid, so "
            "its tokenizer must have one token per cell and no registers."
        )
