"""The depth head's config: the fields of its LLaMA layers, and the variants of other systems."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from transformers import LlamaConfig, PretrainedConfig

from open_unitok.core.errors import UserError, did_you_mean

# fields that the depth head inherits from the decoder unless `depth_config` sets them
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


@dataclasses.dataclass(frozen=True)
class DepthOptions:
    """Variants of the depth head; the defaults are UniTok's. FQGAN's factorised head (arXiv 2411.16681) is
    {rotary: grid, tables: shared, outputs: own, output_bias: false, zero_outputs: true, context: raw}.

    Args:
        rotary: "1d" = RoPE over the K positions; "none"; "grid" = the context's queries and keys are zero,
            and position k > 0 takes the 2-D angles of cell k - 1 of the image's grid.
        tables: embedding tables of the earlier codes: the head's "own", or those of the input embedder,
            "shared".
        outputs: one layer "shared" by all sub-codebooks, or each its "own".
        output_bias: whether the output layers have a bias.
        zero_outputs: whether the output layers start from zero.
        context: the decoder's states, "normed" by its final norm or "raw".
    """

    CHOICES: ClassVar[dict[str, tuple[Any, ...]]] = {
        "rotary": ("1d", "none", "grid"),
        "tables": ("own", "shared"),
        "outputs": ("shared", "own"),
        "output_bias": (True, False),
        "zero_outputs": (False, True),
        "context": ("normed", "raw"),
    }

    rotary: str = "1d"
    tables: str = "own"
    outputs: str = "shared"
    output_bias: bool = True
    zero_outputs: bool = False
    context: str = "normed"

    @classmethod
    def from_config(cls, options: dict[str, Any] | None) -> DepthOptions:
        """
        Raises:
            UserError: an unknown key, or a value that the key does not take.
        """
        if not isinstance(options, dict | None):
            raise UserError(f"depth_options = {options!r}: expected options by name, {{name: value}}.")
        for key, value in (options or {}).items():
            if key not in cls.CHOICES:
                raise UserError(f"Unknown config key 'depth_options.{key}'.{did_you_mean(key, cls.CHOICES)}")
            allowed = cls.CHOICES[key]
            if type(value) is not type(allowed[0]) or value not in allowed:
                names = ", ".join(str(choice).lower() for choice in allowed)
                raise UserError(f"depth_options.{key} = {value!r}: must be one of {names}.")
        return cls(**(options or {}))

    def changes(self) -> dict[str, Any] | None:
        """The options that differ from UniTok's; None if none does."""
        changed = {
            key: value
            for key, value in dataclasses.asdict(self).items()
            if value != getattr(DepthOptions, key)
        }
        return changed or None

    def check(self, depth: LlamaConfig, width: int, input_embedder: str) -> None:
        """
        Args:
            width: of the decoder.

        Raises:
            UserError: an option contradicts the head's layers or the input embedder.
        """
        if self.tables == "shared" and input_embedder != "tables":
            raise UserError(
                f"depth_options.tables = 'shared' needs input_embedder = 'tables', whose tables the head "
                f"shares, not {input_embedder!r}: set both, or depth_options.tables to 'own'."
            )
        if self.tables == "shared" and depth.hidden_size != width:
            raise UserError(
                f"depth_options.tables = 'shared' needs a head of the decoder's width {width}, not "
                f"depth_config.hidden_size = {depth.hidden_size}: leave that out, or set "
                "depth_options.tables to 'own'."
            )
        head_dim = depth.head_dim or depth.hidden_size // depth.num_attention_heads
        if self.rotary == "grid" and head_dim % 4:
            raise UserError(
                f"depth_options.rotary = 'grid' needs a head width that 4 divides, for rows and columns in "
                f"pairs; depth_config.hidden_size = {depth.hidden_size} with "
                f"{depth.num_attention_heads} heads gives {head_dim}."
            )


def depth_config(config: dict[str, Any] | PretrainedConfig | None, text: PretrainedConfig) -> LlamaConfig:
    """The depth head's config: fields of `config`, else those of the decoder, else the defaults.

    Raises:
        UserError: its width is not a multiple of the decoder's heads.
    """
    if isinstance(config, LlamaConfig):
        return config
    fields = config.to_dict() if isinstance(config, PretrainedConfig) else dict(config or {})
    fields.pop("model_type", None)
    shared = {name: getattr(text, name, None) for name in _SHARED}
    if not isinstance(shared["rope_parameters"], dict) or "rope_theta" not in shared["rope_parameters"]:
        shared["rope_parameters"] = None  # Gemma 3 has one set per layer type, which LLaMA layers cannot use
    shared["hidden_act"] = shared["hidden_act"] or getattr(text, "hidden_activation", None) or "silu"
    if fields.keys() & {"hidden_size", "num_attention_heads"}:  # LlamaConfig derives both from the new widths
        shared["head_dim"] = shared["num_key_value_heads"] = None
        if "num_attention_heads" not in fields and fields["hidden_size"] % (
            shared["num_attention_heads"] or 1
        ):
            raise UserError(
                f"depth_config.hidden_size = {fields['hidden_size']} is not a multiple of the decoder's "
                f"{shared['num_attention_heads']} heads: set depth_config.num_attention_heads too."
            )
    # The head embeds codes itself: LlamaConfig's vocabulary and special ids are unused.
    own = {"num_hidden_layers": 3, "vocab_size": 1, "bos_token_id": None, "eos_token_id": None}
    filled = {**own, **{name: value for name, value in shared.items() if value is not None}, **fields}
    return LlamaConfig(**filled)
