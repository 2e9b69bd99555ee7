"""Two encoders side by side, a semantic and a pixel one, in front of a shared index (TokenFlow, arXiv
2412.03069, section 3.1).

B batch, N visual tokens, D width of an encoder's tokens.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from open_unitok.core.errors import UserError

from ..config import PROJECTIONS, UniTokConfig
from ..entries import check_options

BLOCKS = ("semantic", "pixel")  # in the order of the blocks of a shared index


class DualEncoder(nn.Module):
    """(B, 3, H, W) -> (B, N, D of the semantic + D of the pixel encoder): their tokens, concatenated.

    The down projection turns each encoder's share into its own block of the latents.

    `encoder_options`: semantic and pixel, each {encoder: an entry of ENCODERS, projection: of its block
    (None = `projection`), and that entry's options}.

    Attributes:
        widths: D of each. projections: kind of each block's projection, or None.

    Raises:
        UserError: an option is not valid; register tokens.
    """

    def __init__(self, config: UniTokConfig, build_encoder: Callable[[UniTokConfig], Any]) -> None:
        super().__init__()
        if config.num_register_tokens or config.layout.tokens:
            raise UserError(
                "encoder 'dual' makes one token per cell of the grid: set registers and tokens to 0."
            )
        inner = dual_configs(config)
        self.projections = [_projection(config, part) for part in BLOCKS]
        self.semantic, self.pixel = (build_encoder(inner[part]) for part in BLOCKS)
        self.widths = [self.semantic.width, self.pixel.width]
        self.width, self.patch_size = sum(self.widths), config.patch_size

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.semantic(pixels), self.pixel(pixels)], dim=-1)


def dual_configs(config: UniTokConfig) -> dict[str, UniTokConfig]:
    """The config of each of the two encoders.

    Raises:
        UserError: one is missing, or not a mapping with the key `encoder`.
    """
    options = config.encoder_options or {}
    check_options("encoder", config.encoder, options, BLOCKS)
    found = {}
    for part in BLOCKS:
        given = options.get(part)
        if not isinstance(given, dict) or given.get("encoder") in (None, config.encoder):
            raise UserError(
                f"encoder_options.{part} is {given!r}: encoder 'dual' needs {{encoder: an entry of ENCODERS, "
                "and its options}."
            )
        found[part] = inner = copy.copy(config)
        inner.encoder = given["encoder"]
        inner.encoder_options = {k: v for k, v in given.items() if k not in ("encoder", "projection")}
    return found


def _projection(config: UniTokConfig, part: str) -> str | None:
    kind = (config.encoder_options or {})[part].get("projection")
    if kind not in (None, *PROJECTIONS) or kind == "none":
        allowed = ", ".join(name for name in PROJECTIONS if name != "none")
        raise UserError(f"encoder_options.{part}.projection is {kind!r}: it must be one of {allowed}.")
    return kind
