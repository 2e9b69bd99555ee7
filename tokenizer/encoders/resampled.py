"""Query tokens behind any encoder: n tokens of an image instead of one per cell (SweetTok, arXiv 2412.10443,
query autoencoder; with UniTok's quantiser the 1-D tokens of TiTok, arXiv 2406.07550).

B batch, n query tokens, D width, (H, W) image size in pixels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from open_unitok.core.errors import UserError

from ..config import UniTokConfig
from ..entries import check_options, inner_config
from ..layers import NORM_EPS
from ..token_transformer import QueryResampler, query_heads

READS = ("output", "layers")
QUERY_OPTIONS = ("query_layers", "query_heads", "query_reads")


class ResampledEncoder(nn.Module):
    """(B, 3, H, W) -> (B, n, D): n = `token_layout.tokens` learned queries read the tokens of an encoder.

    `encoder_options`: encoder, the entry that is read ("vitamin"); query_layers (8), query_heads (D / 64);
    query_reads: what layer i of the queries reads, the encoder's "output" or, of "layers", the output of its
    layer i, as published. All other options are the inner encoder's.

    Raises:
        UserError: an option is not valid; the layout has registers, or no `tokens`.
    """

    def __init__(self, config: UniTokConfig, build_encoder: Callable[[UniTokConfig], Any]) -> None:
        super().__init__()
        self.tokens = check_queries(config, "encoder", QUERY_OPTIONS)
        self.inner = build_encoder(inner_config(config, "encoder", QUERY_OPTIONS))
        self.width, self.patch_size = self.inner.width, self.inner.patch_size
        options = config.encoder_options or {}
        layers, reads = options.get("query_layers", 8), options.get("query_reads", READS[0])
        if reads not in READS:
            raise UserError(f"encoder_options.query_reads is {reads!r}: it must be {' or '.join(READS)}.")
        self.reads_layers = reads == "layers"
        if self.reads_layers and layers != (found := getattr(self.inner, "num_layers", None)):
            has = f"has {found} layers" if found else "shows no layers"
            raise UserError(
                f"encoder_options.query_reads is layers with query_layers = {layers}, but the inner encoder "
                f"{has}: the numbers must be equal, or query_reads output."
            )
        self.resampler = QueryResampler(
            self.tokens, self.width, layers, query_heads(options, self.width, "encoder")
        )
        self.norm = nn.LayerNorm(self.width, eps=NORM_EPS)
        # queries find a place by its position; the inner encoder's own fade in its layers
        self.positions = nn.Parameter(torch.zeros(config.layout.rows * config.layout.columns, self.width))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        read = self.inner.layer_outputs(pixels) if self.reads_layers else [self.inner(pixels)]
        placed = [tokens + self.positions.to(tokens.dtype) for tokens in read]
        return self.norm(self.resampler(placed if self.reads_layers else placed[0]))

    def init_weights(self) -> None:
        init.normal_(self.positions)


def check_queries(config: UniTokConfig, field: str, own: Sequence[str]) -> int:
    """The number of query tokens of the `field` "encoder" or "decoder".

    Raises:
        UserError: the layout has registers, or no `tokens`; an option is not valid.
    """
    name, layout, options = getattr(config, field), config.layout, getattr(config, f"{field}_options") or {}
    if not layout.tokens:
        raise UserError(
            f"{field} {name!r} needs the number of its query tokens: set token_layout = {{rows: "
            f"{layout.rows}, columns: {layout.columns}, tokens: ...}}."
        )
    if layout.registers:
        raise UserError(
            f"num_register_tokens = {layout.registers}: {field} {name!r} has queries instead, set it to 0."
        )
    if options.get(field) == name:
        raise UserError(f"{field}_options.{field} is {name!r}: query tokens of query tokens; name another.")
    # the inner entry checks the others; a tower of transformers takes any name
    check_options(field, name, {key: options[key] for key in options if key.startswith("query_")}, own)
    layers = options.get("query_layers", 8)
    if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
        raise UserError(f"{field}_options.query_layers is {layers!r}: it must be a whole number from 1.")
    return layout.tokens
