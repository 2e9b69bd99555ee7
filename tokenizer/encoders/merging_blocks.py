"""A transformer that merges tokens, and the check of its options (`encoder_options: {merge: {...}}`).

B batch, N tokens, M tokens that are left, D width.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from open_unitok.core.errors import UserError, did_you_mean

from ..layers import Block, Transformer
from ..token_layout import TokenLayout
from .merging import combine, density_peaks, index_of, match_pairs, merge_schedule, spatial_density_peaks
from .merging import unmerge as copy_back

_PAIRS = ("r", "slope", "order", "proportional_attention")
# method -> its options
METHODS: dict[str, tuple[str, ...]] = {
    "tome": _PAIRS,
    "tofu": (*_PAIRS, "prune_until"),
    "cluster": ("at", "keep", "k", "alpha", "proportional_attention"),
}
_REQUIRED = {"tome": ("r",), "tofu": ("r", "prune_until"), "cluster": ("at", "keep")}


@dataclass(frozen=True)
class MergeOptions:
    """Checked options of token merging.

    Attributes:
        registers: the first tokens, which are never merged.
        r: merged tokens of each block; tome and tofu.
        order: of the tokens that are left, see `match_pairs`.
        how: of each block, see `combine`.
        at: the block before which tokens are clustered; None = tome and tofu.
        keep: clusters of an image: a number of them, or a share of its tokens, rounded up.
        k: neighbours that give the density; one less than the tokens of an image at most.
        alpha: None = `density_peaks`, else that of `spatial_density_peaks`.
        proportional_attention: a token that stands for n attends, and is attended to, as n equal tokens.
    """

    registers: int = 0
    r: list[int] = field(default_factory=list)
    order: Literal["raster", "published"] = "raster"
    how: list[Literal["mean", "mlerp", "prune"]] = field(default_factory=list)
    at: int | None = None
    keep: int | float = 1.0
    k: int = 5
    alpha: float | None = None
    proportional_attention: bool = True

    def num_clusters(self, tokens: int) -> int:
        """M of an image of `tokens` tokens, registers not counted."""
        if isinstance(self.keep, int):
            return min(self.keep, tokens)
        return max(1, math.ceil(round(tokens * self.keep, 6)))


def check_merge(merge: Any, depth: int, layout: TokenLayout) -> MergeOptions:
    """The options of `encoder_options.merge` for `depth` blocks and the training images' layout.

    Smaller images merge less: at most half of their tokens per block, and never below `keep`.

    Raises:
        UserError: an option is not known, missing, or out of range; the message names it.
    """
    if not isinstance(merge, Mapping) or "method" not in merge:
        raise _invalid("", merge, f"expected {{method: {' | '.join(METHODS)}, ...}}")
    options = dict(merge)
    method = options.pop("method")
    if not isinstance(method, str) or method not in METHODS:
        raise UserError(f"encoder_options.merge.method = {method!r}." + did_you_mean(str(method), METHODS))
    for name in options:
        if name not in METHODS[method]:
            raise UserError(
                f"encoder_options.merge.{name} is not an option of method {method!r}."
                f"{did_you_mean(name, METHODS[method])}"
            )
    for name in _REQUIRED[method]:
        if name not in options:
            raise UserError(f"encoder_options.merge.{name} is missing: method {method!r} needs it.")
    proportional = options.get("proportional_attention", True)
    if not isinstance(proportional, bool):
        raise _invalid("proportional_attention", proportional, "expected true or false")
    if method == "cluster":
        return _check_cluster(options, depth, layout)
    order = options.get("order", "raster")
    if order not in ("raster", "published"):
        raise _invalid("order", order, "expected raster or published")
    if order == "published" and layout.registers > 1:
        raise _invalid("order", order, f"it allows one register token, not {layout.registers}; set raster")
    prune_until = options.get("prune_until", 0)
    if not _is_int(prune_until) or not 0 <= prune_until <= depth:
        raise _invalid("prune_until", prune_until, f"expected 0 to {depth}, the number of blocks that prune")
    late = "mlerp" if method == "tofu" else "mean"
    return MergeOptions(
        registers=layout.registers,
        r=_check_r(options, depth, layout),
        order=order,
        how=["prune" if index < prune_until else late for index in range(depth)],
        proportional_attention=proportional,
    )


def _check_r(options: Mapping[str, Any], depth: int, layout: TokenLayout) -> list[int]:
    """The merged tokens of each block."""
    r, slope = options["r"], options.get("slope", 0)
    if isinstance(r, tuple):  # JSON would store it as a list, which means something else
        raise _invalid("r", r, "expected a number or a list of one per block; for (r, slope) set slope")
    if not all(_is_int(value) and value >= 0 for value in (r if isinstance(r, list) else [r])):
        raise _invalid("r", r, "expected a number of at least 0, or a list of them")
    if isinstance(r, list) and len(r) > depth:
        raise _invalid("r", r, f"it has {len(r)} numbers, but the encoder has {depth} blocks")
    if not _is_number(slope) or not -1 <= slope <= 1:
        raise _invalid("slope", slope, "expected -1 to 1")
    if slope and isinstance(r, list):
        raise _invalid("slope", slope, "r is a list, which needs none")
    schedule = merge_schedule(r, depth, slope)
    count = layout.num_tokens
    for index, merged in enumerate(schedule):
        most = (count - layout.registers) // 2
        if merged > most:
            raise _invalid(
                "r", r, f"block {index + 1} of {depth} has {count} tokens left and can merge {most} of them"
            )
        count -= merged
    return schedule


def _check_cluster(options: Mapping[str, Any], depth: int, layout: TokenLayout) -> MergeOptions:
    tokens = layout.num_tokens - layout.registers
    at, keep, k, alpha = options["at"], options["keep"], options.get("k", 5), options.get("alpha")
    if not _is_int(at) or not 0 <= at < depth:
        raise _invalid("at", at, f"expected 0 to {depth - 1}, the block before which tokens are clustered")
    share = isinstance(keep, float) and 0 < keep <= 1
    if not share and not (_is_int(keep) and 1 <= keep <= tokens):
        raise _invalid("keep", keep, f"expected 1 to {tokens} clusters, or a share above 0.0 and up to 1.0")
    if not _is_int(k) or not 1 <= k < tokens:
        raise _invalid("k", k, f"expected 1 to {tokens - 1} neighbours: an image has {tokens} tokens")
    if alpha is not None and not (_is_number(alpha) and 0 <= alpha <= 1):
        raise _invalid("alpha", alpha, "expected null, or 0 to 1")
    proportional = options.get("proportional_attention", True)
    return MergeOptions(
        layout.registers, at=at, keep=keep, k=k, alpha=alpha, proportional_attention=proportional
    )


def _invalid(name: str, value: Any, expected: str) -> UserError:
    return UserError(f"encoder_options.merge{'.' * bool(name)}{name} = {value!r}: {expected}.")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or isinstance(value, float)


# size (B, M): tokens that each one stands for; assign (B, N): the position, among the N at the start, of each
# token's representative; kept (B, M): the positions of the tokens that are left, in their order
MergeState = tuple[Tensor, Tensor, Tensor]


class MergingBlock(Block):
    """A block that merges tokens before its attention (clusters) or between attention and MLP (pairs)."""

    merge: MergeOptions
    index: int

    def forward(
        self, hidden: Tensor, noise: Tensor | None, size: Tensor, assign: Tensor, kept: Tensor, grid: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, M, D) hidden -> the hidden, size, assign and kept after this block; see `MergeState`."""
        merge, state = self.merge, (size, assign, kept)
        first, second = (None, None) if noise is None else noise
        if merge.at == self.index:
            hidden, state = self._cluster(hidden, state, grid)
        bias = None
        # Without a bias attention stays on the flash path: until the first merge all sizes are 1.
        if merge.proportional_attention and hidden.shape[1] < assign.shape[1]:
            bias = state[0].log()[:, None, None]  # (B, 1, 1, M)
        mixed, keys = self.attention.mix(self.norm1(hidden), bias)
        hidden = hidden + self._drop_path(mixed, first)
        if merge.at is None and merge.r[self.index]:
            pairs = match_pairs(keys.mean(dim=1), merge.r[self.index], merge.registers, merge.order)
            hidden, state = merge_into(hidden, state, *pairs, how=merge.how[self.index])
        return hidden + self._drop_path(self.mlp(self.norm2(hidden)), second), *state

    def _cluster(self, hidden: Tensor, state: MergeState, grid: tuple[int, int]) -> tuple[Tensor, MergeState]:
        """Cluster by the keys that this block would attend to; distances of D numbers cost 16 times more."""
        merge, registers = self.merge, self.merge.registers
        tokens = hidden.shape[1] - registers
        keep = merge.num_clusters(tokens)
        if keep >= tokens:
            return hidden, state
        k = min(merge.k, tokens - 1)
        with torch.no_grad():
            keys = self.attention.mix(self.norm1(hidden))[1].mean(dim=1)[:, registers:]
            metric = torch.nn.functional.normalize(keys.float(), dim=-1)
        if merge.alpha is None:
            found = density_peaks(metric, keep, k)
        else:
            found = spatial_density_peaks(metric, grid, keep, k, merge.alpha)
        alone = torch.arange(registers, device=hidden.device).expand(len(hidden), -1)
        assign, kept = (torch.cat([alone, found[name] + registers], dim=1) for name in ("assign", "kept"))
        return merge_into(hidden, state, assign, kept, how="mean")


def merge_into(
    hidden: Tensor, state: MergeState, assign: Tensor, kept: Tensor, how: Literal["mean", "mlerp", "prune"]
) -> tuple[Tensor, MergeState]:
    """`combine` the (B, M, D) hidden, whose `state` may hold earlier merges."""
    size, before, places = state
    merged, new_size = combine(hidden, size, assign, kept, how)
    # positions among the M of now -> among the N of the start
    assign = places.gather(1, assign.gather(1, index_of(before, places)))
    return merged, (new_size, assign, places.gather(1, kept))


class MergingTransformer(Transformer):
    """A `Transformer` with the same weights whose blocks merge tokens; the result has all of them again."""

    block_type = MergingBlock

    def __init__(
        self, width: int, depth: int, heads: int, mlp_ratio: float, drop_path_rate: float, merge: MergeOptions
    ) -> None:
        super().__init__(width, depth, heads, mlp_ratio, drop_path_rate)
        blocks: Any = self
        for index, block in enumerate(blocks):
            block.merge, block.index = merge, index

    def merged_outputs(self, hidden: Tensor, grid: tuple[int, int]) -> Iterator[tuple[Tensor, MergeState]]:
        """Yield the (B, M, D) output of every block, and what stands for what after it."""
        batch, count, _ = hidden.shape
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        size = torch.ones(batch, count, device=hidden.device, dtype=dtype)
        assign = torch.arange(count, device=hidden.device).repeat(batch, 1)
        state: MergeState = (size, assign, assign)
        for block, noise in zip(self, self.noise_for(hidden)):
            hidden, *rest = self.call(block, hidden, noise, *state, grid)
            state = (rest[0], rest[1], rest[2])
            yield hidden, state

    def layer_outputs(self, hidden: Tensor, grid: tuple[int, int]) -> Iterator[Tensor]:  # pyright: ignore
        """Yield the output of every block as (B, N, D): copies for merged tokens."""
        for output, (_, assign, kept) in self.merged_outputs(hidden, grid):
            yield output if kept.shape[1] == assign.shape[1] else copy_back(output, assign, kept)

    def forward(self, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, N, D), registers first, then a (rows, columns) grid -> (B, N, D): copies for merged tokens."""
        for hidden, (_, assign, kept) in self.merged_outputs(hidden, grid):  # noqa: B007,B020
            pass
        return hidden if kept.shape[1] == assign.shape[1] else copy_back(hidden, assign, kept)
