"""Tokens to pixels: the ViTamin encoder mirrored (arXiv 2502.20321, section 4.1).

B batch, N visual tokens (registers first), D width, (rows, columns) grid of visual tokens.
"""

from types import SimpleNamespace

import torch
from torch import nn

from .. import cpu
from ..config import UniTokConfig
from ..layers import NORM_EPS, ChannelNorm, Conv2d, ConvStage, Recomputing, Transformer, Upsample

# Config fields that `decoder_options` may override.
_FIELDS = (
    "decoder_widths",
    "decoder_depths",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "mlp_ratio",
    "drop_path_rate",
)


class ViTaminDecoder(Recomputing, nn.Module):
    """A transformer, then four 2x upsamplings; (B, N, D) -> (B, 3, 16*rows, 16*columns), not clamped."""

    patch_size = 16  # 2 ** number of upsamplings

    def __init__(self, config: UniTokConfig) -> None:
        super().__init__()
        sizes = SimpleNamespace(**config.part_sizes("decoder", _FIELDS))
        self.width = width = sizes.hidden_size
        wide, narrow = sizes.decoder_widths
        self.num_register_tokens = config.num_register_tokens
        self.blocks = Transformer(
            width, sizes.num_hidden_layers, sizes.num_attention_heads, sizes.mlp_ratio, sizes.drop_path_rate
        )
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.enter = Upsample(width, wide)
        self.wide = ConvStage(wide, wide, sizes.decoder_depths[0], scale=2.0)
        self.narrow = ConvStage(wide, narrow, sizes.decoder_depths[1], scale=2.0)
        self.leave = Upsample(narrow, narrow)
        self.leave_norm = ChannelNorm(narrow)
        self.to_pixels = Conv2d(narrow, 3, 3)
        # The published decoder initialises all its convolutions alike, including those in ConvBlocks.
        for module in self.modules():
            if isinstance(module, Conv2d):
                module.weight_init = "xavier"

    @property
    def last_weight(self) -> torch.Tensor:
        """The last layer's weight; the adaptive GAN weight compares gradients there (VQGAN's rule)."""
        return self.to_pixels.weight

    def forward(self, hidden: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        # Register tokens take part in attention but are not part of the image.
        hidden = self.norm(self.blocks(hidden)[:, self.num_register_tokens :])
        # (B, N, D) -> (B, D, rows, columns). channels_last: norms over the channels then need no copies.
        map = hidden.transpose(1, 2).unflatten(2, grid).contiguous(memory_format=torch.channels_last)
        map = self.narrow(self.wide(self.call(self.enter, map)))
        # the last layer keeps its input: the adaptive GAN weight differentiates it before the others
        return self.to_pixels(self.call(self._left, map))

    def _left(self, map: torch.Tensor) -> torch.Tensor:
        return cpu.gelu(self.leave_norm(self.leave(map)))
