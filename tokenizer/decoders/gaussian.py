"""2D Gaussians to pixels: a splat, then any pixel decoder (GaussianToken, arXiv 2501.15619).

B batch, G Gaussians, F feature channels, (rows, columns) grid of the map.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..config import GEOMETRY, UniTokConfig
from ..entries import check_gaussian, inner_config
from ..precision import to_dtype_of
from .splat import splat

_NUMBERS = len(GEOMETRY)


class GaussianDecoder(nn.Module):
    """(B, G, F + 5) features and geometry values, from quantiser `gaussian` -> pixels, not clamped.

    `decoder_options`: decoder, the entry that reads the splatted map ("vqgan"); all other options are
    its own. A linear map leads from F channels to its width where the two differ.

    Raises:
        UserError: see `GaussianEncoder`.
    """

    reads_float32 = True  # half precision would move centres by a sixteenth of a cell and more

    def __init__(self, config: UniTokConfig, build_decoder: Callable[[UniTokConfig], Any]) -> None:
        super().__init__()
        check_gaussian(config, "decoder")
        self.inner = build_decoder(inner_config(config, "decoder", (), "vqgan"))
        self.tokens, self.patch_size = config.layout.tokens, self.inner.patch_size
        self.width = config.codebook_dim
        features = self.width - _NUMBERS
        same = features == self.inner.width
        self.widen = nn.Identity() if same else nn.Linear(features, self.inner.width)

    @property
    def last_weight(self) -> torch.Tensor:
        return self.inner.last_weight

    def forward(self, hidden: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        features, xy, rotation, scale = hidden.split([self.width - _NUMBERS, 2, 1, 2], dim=-1)
        map = splat(xy, scale, rotation[..., 0], features, grid)
        cells = to_dtype_of(self.inner, map.flatten(2).transpose(1, 2))
        return self.inner(self.widen(cells), grid)
