"""Tokens to pixels by VQGAN's convolutional network (arXiv 2012.09841), its encoder mirrored.

B batch, N visual tokens, D hidden_size: width of the map behind the quantiser's 1x1 convolution,
(rows, columns) grid of tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..config import UniTokConfig
from ..layers import Recomputing
from .blocks import group_norm, level_of_blocks, middle_blocks, run_level, run_middle, vqgan_sizes


class VQGANDecoder(Recomputing, nn.Module):
    """Residual blocks and 2x upsamplings; (B, N, D) -> (B, 3, patch*rows, patch*columns), not clamped.

    `decoder_options` are those of the encoder; a level has one residual block more.
    """

    def __init__(self, config: UniTokConfig) -> None:
        super().__init__()
        sizes = vqgan_sizes(config, "decoder")
        self.width, self.patch_size = sizes.hidden_size, sizes.patch_size
        lowest = sizes.widths[-1]
        self.conv_in = nn.Conv2d(self.width, lowest, 3, padding=1)
        self.mid = middle_blocks(lowest, sizes.norm_groups)
        # up[i] runs at the resolution of the encoder's down[i]
        self.up: Any = nn.ModuleList()
        for level, outputs in enumerate(sizes.widths):
            inputs = sizes.widths[level + 1] if level + 1 < len(sizes.widths) else lowest
            block = level_of_blocks(inputs, outputs, sizes.residual_blocks + 1, level, sizes)
            if level:
                block["upsample"] = nn.ModuleDict({"conv": nn.Conv2d(outputs, outputs, 3, padding=1)})
            self.up.append(block)
        self.norm_out = group_norm(sizes.widths[0], sizes.norm_groups)
        self.conv_out = nn.Conv2d(sizes.widths[0], 3, 3, padding=1)

    @property
    def last_weight(self) -> torch.Tensor:
        """The last layer's weight; the adaptive GAN weight compares gradients there (VQGAN's rule)."""
        return self.conv_out.weight

    def forward(self, hidden: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        map = run_middle(self.mid, self.conv_in(hidden.transpose(1, 2).unflatten(2, grid)), self.call)
        for level in reversed(self.up):
            map = run_level(level, map, self.call)
            if "upsample" in level:
                map = self.call(self._doubled, level["upsample"]["conv"], map)
        # the last layer keeps its input: the adaptive GAN weight differentiates it before the others
        return self.conv_out(self.call(self._left, map))

    def _doubled(self, convolution: nn.Module, map: torch.Tensor) -> torch.Tensor:
        return convolution(F.interpolate(map, scale_factor=2.0, mode="nearest"))

    def _left(self, map: torch.Tensor) -> torch.Tensor:
        return F.silu(self.norm_out(map))
