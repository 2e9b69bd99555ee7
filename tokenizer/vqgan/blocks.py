"""Sizes and blocks that VQGAN's encoder and decoder share (arXiv 2012.09841)."""

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from open_unitok.core.errors import UserError

from ..config import UniTokConfig
from ..entries import check_options

# VQGAN's f16 networks for ImageNet, as IBQ's (which has 4 residual blocks) and LlamaGen's
DEFAULTS: dict[str, Any] = {
    "channels": 128,
    "multipliers": (1, 1, 2, 2, 4),
    "residual_blocks": 2,
    "attention_levels": (4,),
    "norm_groups": 32,
}


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut; (B, inputs, H, W) -> (B, outputs, H, W)."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(inputs, groups)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = group_norm(outputs, groups)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, map: torch.Tensor) -> torch.Tensor:
        inner = self.conv1(F.silu(self.norm1(map)))
        return self.nin_shortcut(map) + self.conv2(F.silu(self.norm2(inner)))


class SpatialAttention(nn.Module):
    """Self-attention of one head over all positions of a map; (B, width, H, W) -> the same."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(width, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, map: torch.Tensor) -> torch.Tensor:
        normed = self.norm(map)
        # (B, width, H, W) -> (B, 1, H*W, width)
        query, key, value = (f(normed).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))
        found = F.scaled_dot_product_attention(query, key, value)[:, 0]
        return map + self.proj_out(found.transpose(1, 2).unflatten(2, map.shape[2:]))


def level_of_blocks(
    inputs: int, outputs: int, count: int, level: int, sizes: SimpleNamespace
) -> nn.ModuleDict:
    """The blocks of one level, with an attention after each where the level has attention."""
    widths = [inputs] + [outputs] * count
    blocks = [ResidualBlock(i, o, sizes.norm_groups) for i, o in itertools.pairwise(widths)]
    modules = {"block": nn.ModuleList(blocks)}
    if level in sizes.attention_levels:
        modules["attn"] = nn.ModuleList([SpatialAttention(outputs, sizes.norm_groups) for _ in blocks])
    return nn.ModuleDict(modules)


def run_level(level: Any, map: torch.Tensor, call: Callable[..., Any]) -> torch.Tensor:
    """The result of a level's blocks and attentions; `call` as of `Recomputing`."""
    for number, block in enumerate(level["block"]):
        map = call(block, map)
        if "attn" in level:
            map = call(level["attn"][number], map)
    return map


def middle_blocks(width: int, groups: int) -> nn.ModuleDict:
    """The blocks at the lowest resolution, in their order."""
    return nn.ModuleDict(
        {
            "block_1": ResidualBlock(width, width, groups),
            "attn_1": SpatialAttention(width, groups),
            "block_2": ResidualBlock(width, width, groups),
        }
    )


def run_middle(blocks: nn.ModuleDict, map: torch.Tensor, call: Callable[..., Any]) -> torch.Tensor:
    """The result of `middle_blocks`; `call` as of `Recomputing`."""
    for block in blocks.values():
        map = call(block, map)
    return map


def group_norm(width: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, width, eps=1e-6)


def vqgan_sizes(config: UniTokConfig, part: str) -> SimpleNamespace:
    """`DEFAULTS` with the options of `part`, "encoder" or "decoder"; `widths` of the levels, `patch_size`.

    Raises:
        UserError: an option is not known or does not fit; there are register tokens.
    """
    options = getattr(config, f"{part}_options") or {}
    check_options(part, "vqgan", options, ("hidden_size", *DEFAULTS))
    sizes = SimpleNamespace(**{"hidden_size": config.hidden_size, **DEFAULTS, **options})
    lists = {name: getattr(sizes, name) for name in ("multipliers", "attention_levels")}
    numbers = {name: getattr(sizes, name) for name in vars(sizes).keys() - lists.keys()}
    for name, value in numbers.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{part}_options.{name} is {value!r}: it must be a number of at least 1.")
    for name, value in lists.items():
        least = 1 if name == "multipliers" else 0
        whole = isinstance(value, list | tuple) and all(type(v) is int and v >= least for v in value)
        if not whole or (name == "multipliers" and not value):
            raise UserError(f"{part}_options.{name} is {value!r}: expected a list of numbers, one per level.")
    if any(level >= len(sizes.multipliers) for level in sizes.attention_levels):
        raise UserError(
            f"{part}_options.attention_levels is {list(sizes.attention_levels)}: the levels are 0 to "
            f"{len(sizes.multipliers) - 1}, one per multiplier."
        )
    sizes.widths = [sizes.channels * multiplier for multiplier in sizes.multipliers]
    for width in (sizes.channels, *sizes.widths):
        if width % sizes.norm_groups:
            raise UserError(
                f"{part}_options.norm_groups is {sizes.norm_groups}, which does not divide {width} channels."
            )
    if config.num_register_tokens:
        raise UserError(
            f"num_register_tokens = {config.num_register_tokens}: {part} 'vqgan' has no register tokens, "
            "set it to 0."
        )
    sizes.patch_size = 2 ** (len(sizes.multipliers) - 1)
    return sizes
