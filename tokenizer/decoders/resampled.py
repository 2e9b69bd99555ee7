"""From n query tokens back to the grid, before any pixel decoder (SweetTok, arXiv 2412.10443, query
autoencoder).

B batch, n query tokens, D width, (rows, columns) grid of patches.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from ..config import UniTokConfig
from ..encoders.resampled import check_queries
from ..entries import inner_config
from ..token_transformer import QueryResampler, query_heads

_OPTIONS = ("query_layers", "query_heads")


class ResampledDecoder(nn.Module):
    """(B, n, D) -> pixels: a learned mask token with its position for each cell reads the n tokens, and a
    decoder makes pixels of the grid.

    `decoder_options`: decoder, the entry that makes the pixels ("vitamin"); query_layers (8), query_heads
    (D / 64). All other options are the inner decoder's.

    Raises:
        UserError: an option is not valid; the layout has registers, or no `tokens`.
    """

    def __init__(self, config: UniTokConfig, build_decoder: Callable[[UniTokConfig], Any]) -> None:
        super().__init__()
        self.tokens = check_queries(config, "decoder", _OPTIONS)
        inner = build_decoder(inner_config(config, "decoder", _OPTIONS))
        self.width, self.patch_size = inner.width, inner.patch_size
        options, (rows, columns) = config.decoder_options or {}, config.layout.grid
        # attention has no order: the position tells which of the n queries a token is
        self.positions = nn.Parameter(torch.zeros(self.tokens, self.width))
        self.resampler = QueryResampler(
            rows * columns,
            self.width,
            options.get("query_layers", 8),
            query_heads(options, self.width, "decoder"),
        )
        self.inner = inner

    @property
    def last_weight(self) -> torch.Tensor:
        return self.inner.last_weight

    def forward(self, hidden: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return self.inner(self.resampler(hidden + self.positions.to(hidden.dtype)), grid)

    def init_weights(self) -> None:
        init.normal_(self.positions)
