"""Baseline of benchmarks/tokenizer.py: the published order of operations in eager PyTorch, over our weights.

Contiguous maps (B, C, H, W), tokens (B, N, D), torch's default operators, upsampling before the convolution.
"""

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.layers import Block, ChannelNorm, ConvBlock, GeGLU, Upsample


def baseline_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def baseline_conv(layer: nn.Conv2d, map: Tensor) -> Tensor:
    return F.conv2d(map, layer.weight, layer.bias, layer.stride, layer.padding, groups=layer.groups)


def baseline_norm(norm: ChannelNorm, map: Tensor) -> Tensor:
    return nn.LayerNorm.forward(norm, map.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


def baseline_upsample(layer: Upsample, map: Tensor) -> Tensor:
    return baseline_conv(layer.conv, F.interpolate(map, scale_factor=2, mode="nearest"))


def baseline_conv_block(block: ConvBlock, map: Tensor) -> Tensor:
    # downsampling blocks have scale 0.5; their shortcut is pooled, as published
    shortcut = F.avg_pool2d(map, 3, 2, 1, count_include_pad=False) if block.scale == 0.5 else map
    if block.shortcut is not None:
        up = isinstance(block.shortcut, Upsample)
        shortcut = baseline_upsample(block.shortcut, map) if up else baseline_conv(block.shortcut, shortcut)
    branch = F.gelu(baseline_conv(block.widen, baseline_norm(block.norm, map)))
    if block.upsample is not None:
        branch = baseline_upsample(block.upsample, branch)
    return shortcut + baseline_conv(block.narrow, F.gelu(baseline_conv(block.depthwise, branch)))


def baseline_mlp(mlp: GeGLU, x: Tensor) -> Tensor:
    x = mlp.norm(x)
    gate = F.gelu(baseline_linear(mlp.gate, x), approximate="tanh")
    return baseline_linear(mlp.down, gate * baseline_linear(mlp.up, x))


def baseline_block(block: Block, x: Tensor) -> Tensor:
    attention = block.attention
    # (B, N, 3, heads, width) -> three of (B, heads, N, width)
    qkv = baseline_linear(attention.qkv, block.norm1(x)).unflatten(-1, (3, attention.heads, -1))
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    x = x + baseline_linear(attention.out, mixed)
    return x + baseline_mlp(block.mlp, block.norm2(x))


def baseline_projection(projection: Any, x: Tensor) -> Tensor:
    os.environ["UNITOK_FAST_CPU"] = "0"  # torch's own operators
    try:
        return projection(x)
    finally:
        del os.environ["UNITOK_FAST_CPU"]


@torch.no_grad()
def baseline_latents(model: UniTok, pixels: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, N, K*C)."""
    encoder = model.encoder
    map = baseline_conv(encoder.stem.conv1, pixels.contiguous())
    map = baseline_conv(encoder.stem.conv2, F.gelu(baseline_norm(encoder.stem.norm, map)))
    for stage in encoder.stages:
        for block in stage:
            map = baseline_conv_block(block, map)
    x = baseline_conv(encoder.pool, baseline_norm(encoder.pool_norm, map)).flatten(2).transpose(1, 2)
    if encoder.register_tokens is not None:
        x = torch.cat([encoder.register_tokens.expand(len(x), -1, -1), x], dim=1)
    x = x + encoder.position_offset
    for block in encoder.blocks:
        x = baseline_block(block, x)
    return baseline_projection(model.down_projection, encoder.norm(x))


def baseline_encode(model: UniTok, pixels: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, N, K) codes."""
    return model.quantizer.encode(baseline_latents(model, pixels))


@torch.no_grad()
def baseline_decode(model: UniTok, codes: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, N, K) codes -> (B, 3, H, W) in [-1, 1]."""
    decoder = model.decoder
    x = baseline_projection(model.up_projection, model.quantizer.embed(codes))
    for block in decoder.blocks:
        x = baseline_block(block, x)
    # register tokens carry no pixels
    x = decoder.norm(x[:, decoder.num_register_tokens :])
    map = baseline_upsample(decoder.enter, x.transpose(1, 2).unflatten(2, grid).contiguous())
    for block in [*decoder.wide, *decoder.narrow]:
        map = baseline_conv_block(block, map)
    map = baseline_upsample(decoder.leave, map)
    return baseline_conv(decoder.to_pixels, F.gelu(baseline_norm(decoder.leave_norm, map))).clamp(-1, 1)
