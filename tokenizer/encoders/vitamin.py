"""Pixels to tokens: the hybrid ViTamin encoder (arXiv 2404.02132; arXiv 2502.20321, section 4.1).

B batch, N visual tokens (registers first), D width, (H, W) image size in pixels.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .. import cpu
from ..config import UniTokConfig
from ..layers import NORM_EPS, ChannelNorm, Conv2d, ConvStage, Recomputing, Transformer
from .merging_blocks import MergingTransformer, check_merge

# Config fields that `encoder_options` may override.
_FIELDS = (
    "stem_width",
    "stage_widths",
    "stage_depths",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "mlp_ratio",
    "drop_path_rate",
)


class Stem(nn.Module):
    """Two 3x3 convolutions, the first with stride 2; (B, 3, H, W) -> (B, width, H/2, W/2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = Conv2d(3, width, 3, stride=2, weight_init="fan_out")
        self.norm = ChannelNorm(width)
        self.conv2 = Conv2d(width, width, 3, weight_init="fan_out")

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.conv2(cpu.gelu(self.norm(self.conv1(pixels))))


class ViTaminEncoder(Recomputing, nn.Module):
    """Convolutions, then a transformer; (B, 3, H, W) -> (B, N, D) with N = registers + H*W/256.

    Besides sizes `encoder_options` takes `merge`, the options of token merging (`check_merge`); None = none.
    """

    patch_size = 16  # the product of the convolutional strides
    position_offset: torch.Tensor

    def __init__(self, config: UniTokConfig) -> None:
        super().__init__()
        options = config.part_sizes("encoder", _FIELDS, ("merge",))
        merge, sizes = options.pop("merge", None), SimpleNamespace(**options)
        self.width = width = sizes.hidden_size
        inputs, outputs = sizes.stage_widths
        self.stem = Stem(sizes.stem_width)
        self.stages = nn.ModuleList(
            [
                ConvStage(sizes.stem_width, inputs, sizes.stage_depths[0], scale=0.5),
                ConvStage(inputs, outputs, sizes.stage_depths[1], scale=0.5),
            ]
        )
        self.pool_norm = ChannelNorm(outputs)
        self.pool = Conv2d(outputs, width, 3, stride=2)
        registers = config.num_register_tokens
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        # Published checkpoints carry one offset for all tokens: initialised to zero and never trained. There
        # are no position embeddings; the convolutions tell the transformer where a token is.
        self.register_buffer("position_offset", torch.zeros(1, 1, width))
        depth = sizes.num_hidden_layers
        shape = (width, depth, sizes.num_attention_heads, sizes.mlp_ratio, sizes.drop_path_rate)
        self.blocks: Any  # both kinds have the same weights
        if merge is not None:
            self.blocks = MergingTransformer(*shape, check_merge(merge, depth, config.layout))
        else:
            self.blocks = Transformer(*shape)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, H*W/256, D) in raster order: the convolutional half."""
        # channels_last: norms over the channels then need no copies
        map = self.call(self.stem, pixels.contiguous(memory_format=torch.channels_last))
        for stage in self.stages:
            map = stage(map)
        return self.call(self._pooled, map).flatten(2).transpose(1, 2)

    def _pooled(self, map: torch.Tensor) -> torch.Tensor:
        return self.pool(self.pool_norm(map))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.norm(self.blocks(*self._block_inputs(pixels)))

    @property
    def num_layers(self) -> int:
        """Number of `layer_outputs`."""
        return len(self.blocks)

    def layer_outputs(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """The output of every block of the transformer; the last one is that of `forward`."""
        *outputs, last = self.blocks.layer_outputs(*self._block_inputs(pixels))
        return [*outputs, self.norm(last)]

    def _block_inputs(self, pixels: torch.Tensor) -> tuple[Any, ...]:
        tokens = self.patches(pixels)
        if self.register_tokens is not None:
            # (B, registers, D), before the image tokens
            registers = self.register_tokens.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
            tokens = torch.cat([registers, tokens], dim=1)
        tokens = tokens + self.position_offset.to(tokens.dtype)
        if not isinstance(self.blocks, MergingTransformer):
            return (tokens,)
        return tokens, (pixels.shape[2] // self.patch_size, pixels.shape[3] // self.patch_size)

    def init_weights(self) -> None:
        init.zeros_(self.position_offset)
        if self.register_tokens is not None:
            init.normal_(self.register_tokens, std=0.02)
