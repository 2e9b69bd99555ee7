"""From tokens to pixels: the encoder's mirror image (arXiv 2502.20321, section 4.1).

B batch, N visual tokens (registers first), D width, (rows, columns) grid of visual tokens.
"""

import torch
from torch import nn

from .. import cpu
from ..config import UniTokConfig
from ..layers import NORM_EPS, ChannelNorm, Conv2d, Upsample, build_transformer, conv_stage


class Decoder(nn.Module):
    """A transformer, then four doublings; (B, N, D) -> (B, 3, 16*rows, 16*columns), no output activation."""

    def __init__(self, config: UniTokConfig) -> None:
        super().__init__()
        width = config.hidden_size
        wide, narrow = config.decoder_widths
        self.num_register_tokens = config.num_register_tokens
        self.blocks = build_transformer(config)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.enter = Upsample(width, wide)
        self.wide = conv_stage(wide, wide, config.decoder_depths[0], scale=2.0)
        self.narrow = conv_stage(wide, narrow, config.decoder_depths[1], scale=2.0)
        self.leave = Upsample(narrow, narrow)
        self.leave_norm = ChannelNorm(narrow)
        self.to_pixels = Conv2d(narrow, 3, 3)
        for module in self.modules():
            if isinstance(module, Conv2d):
                module.start = "xavier"

    @property
    def last_weight(self) -> torch.Tensor:
        """The weight whose gradients balance reconstruction against the discriminator."""
        return self.to_pixels.weight

    def forward(self, hidden: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        hidden = self.norm(self.blocks(hidden)[:, self.num_register_tokens :])
        map = hidden.transpose(1, 2).unflatten(2, grid).contiguous(memory_format=torch.channels_last)
        map = self.leave(self.narrow(self.wide(self.enter(map))))
        return self.to_pixels(cpu.gelu(self.leave_norm(map)))
