"""Pixels to tokens by VQGAN's convolutional network (arXiv 2012.09841), which IBQ and LlamaGen have as well.

B batch, N visual tokens, D hidden_size: width of the map before the quantiser's 1x1 convolution, (H, W) image
size in pixels. Modules have the names of the published code.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..config import UniTokConfig
from ..layers import Recomputing
from .blocks import group_norm, level_of_blocks, middle_blocks, run_level, run_middle, vqgan_sizes


class VQGANEncoder(Recomputing, nn.Module):
    """Residual blocks and stride-2 convolutions; (B, 3, H, W) -> (B, N, D), N = H*W / patch_size**2.

    `encoder_options`: `channels` of the first level; `multipliers` of them, one per level, each half the size
    of the one before; `residual_blocks` per level; `attention_levels`, counted from 0, where self-attention
    follows each block; `norm_groups` of each GroupNorm; `hidden_size` D, by default the config's.
    """

    def __init__(self, config: UniTokConfig) -> None:
        super().__init__()
        sizes = vqgan_sizes(config, "encoder")
        self.width, self.patch_size = sizes.hidden_size, sizes.patch_size
        widths = [sizes.channels, *sizes.widths]
        self.conv_in = nn.Conv2d(3, sizes.channels, 3, padding=1)
        self.down: Any = nn.ModuleList()
        for level, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            block = level_of_blocks(inputs, outputs, sizes.residual_blocks, level, sizes)
            if level < len(sizes.widths) - 1:
                block["downsample"] = nn.ModuleDict({"conv": nn.Conv2d(outputs, outputs, 3, stride=2)})
            self.down.append(block)
        self.mid = middle_blocks(widths[-1], sizes.norm_groups)
        self.norm_out = group_norm(widths[-1], sizes.norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], self.width, 3, padding=1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        map = self.conv_in(pixels)
        for level in self.down:
            map = run_level(level, map, self.call)
            if "downsample" in level:
                # one row and column of zeros at the far sides alone, as published
                map = level["downsample"]["conv"](F.pad(map, (0, 1, 0, 1)))
        map = self.call(self._left, run_middle(self.mid, map, self.call))
        return map.flatten(2).transpose(1, 2)

    def _left(self, map: torch.Tensor) -> torch.Tensor:
        return self.conv_out(F.silu(self.norm_out(map)))
