"""Tokens to pixels by a plain transformer and one linear map a patch, for patches of any size (ViT-VQGAN,
arXiv 2110.04627).

B batch, N visual tokens (registers first), D width, (rows, columns) grid of visual tokens.
"""

from types import SimpleNamespace

import torch
from torch import nn

from open_unitok.core.errors import UserError

from ..config import UniTokConfig
from ..layers import Linear
from ..token_transformer import TokenTransformer

# Config fields that `decoder_options` may override.
_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads")


class ViTDecoder(nn.Module):
    """(B, N, D) -> (B, 3, patch_size*rows, patch_size*columns), not clamped.

    Patches are as large as the encoder's. Positions are learned, and interpolated for other grids than that
    of a training image.
    """

    def __init__(self, config: UniTokConfig) -> None:
        super().__init__()
        sizes = SimpleNamespace(**config.part_sizes("decoder", _FIELDS))
        depth = sizes.num_hidden_layers
        if type(depth) is not int or depth < 1:
            raise UserError(f"decoder_options.num_hidden_layers is {depth!r}: it must be 1 or more.")
        self.width, self.patch_size = sizes.hidden_size, config.patch_size
        self.num_register_tokens = config.num_register_tokens
        self.transformer = TokenTransformer(
            self.width, sizes.num_hidden_layers, sizes.num_attention_heads, config.layout
        )
        self.to_pixels = Linear(self.width, 3 * self.patch_size**2)

    @property
    def last_weight(self) -> torch.Tensor:
        """The last layer's weight; the adaptive GAN weight compares gradients there (VQGAN's rule)."""
        return self.to_pixels.weight

    def forward(self, hidden: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        hidden = self.transformer(hidden, grid)[:, self.num_register_tokens :]
        # (B, rows*columns, 3*p*p) -> (B, 3, rows*p, columns*p)
        patches = self.to_pixels(hidden).unflatten(1, grid)
        patches = patches.unflatten(-1, (3, self.patch_size, self.patch_size))
        return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
