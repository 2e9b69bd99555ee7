"""2D Gaussians as tokens: features by any other quantiser, geometry continuous or by levels (GaussianToken,
arXiv 2501.15619).

B batch, G Gaussians (tokens), F feature channels, K codes per token, D = F + 5 numbers per token.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

from open_unitok.core.errors import UserError, did_you_mean

from ..config import GEOMETRY
from ..precision import exact_float32
from ..token_layout import TokenLayout
from .base import Quantizer, QuantizerOutput, WriteRows, normalise_blocks, pass_through
from .options import check_quantizer_options

SCALE_RANGE = (0.1, 4.0)  # standard deviations in pixels of the map
SCALE_END = 3.0  # to which the upper bound falls
SCALE_RATE, SCALE_DECAY, SCALE_EXCESS = 1e-3, 0.99, 0.01  # its fall in a training step
RAW_LIMIT = 9.21024  # logit of .9999
BITS = 32  # of a continuous number
INCOMPLETE = (
    "This tokenizer's codes are incomplete: quantizer 'gaussian' without quantizer_options.levels has "
    "continuous geometry, 5 floats a token. Only reconstruct works; train with levels for codes."
)


class GaussianQuantizer(Quantizer):
    """Latents [F features | 5 raw geometry numbers] -> [quantised features | geometry values].

    The values are what `decoders.splat.splat` reads: centre in [-1, 1], rotation, scales in pixels of the
    map. With `levels` a token has the codes of its features, then five for `GEOMETRY`: the cell of each
    number's sigmoid, read as the middle of the cell, with a straight-through gradient to the raw number.
    Without them geometry stays continuous, as published: five floats that no code carries, so `encode` is
    refused and `quantise` works.

    In training the largest scale falls from 4 to 3 pixels: with m the running mean of all scales, by 1e-3 *
    max(m - middle of the range, .01) a step. Losses are those of the inner quantiser.

    Args:
        num_codebooks: K: the inner quantiser's, and 5 with `levels`.
        codebook_size: V of the inner quantiser, at least the largest of `levels`.
        codebook_dim: D = F + 5, of all feature books together.
        inner: one of `inner_kinds`, for the features; inner_options: its keyword arguments.
        levels: numbers of cells of x, y, rotation, scale x, scale y; None = continuous.

    Attributes:
        largest: upper bound of the scales; saved, as the values of codes depend on it.
        mean_scale: m; starts at the middle of the range.
    """

    inner_kinds: ClassVar[dict[str, type[Quantizer]]]  # entries of QUANTIZERS
    row_norm = "none"
    no_codes = INCOMPLETE
    sums_rows = True  # each code has its own columns of the latent, the others are 0
    largest: Tensor
    mean_scale: Tensor

    def __init__(
        self,
        num_codebooks: int,
        codebook_size: int,
        codebook_dim: int,
        inner: str = "nearest_ema",
        inner_options: dict[str, Any] | None = None,
        levels: Sequence[int] | None = None,
    ) -> None:
        books = num_codebooks - (0 if levels is None else len(GEOMETRY))
        if not isinstance(inner_options or {}, dict):
            raise UserError(f"quantizer_options.inner_options is {inner_options!r}: expected a mapping.")
        _check(inner, self.inner_kinds, books, codebook_size, codebook_dim, levels)
        built = self._build_inner(inner, inner_options or {}, books, codebook_size, codebook_dim)
        super().__init__([*built.code_sizes, *(levels or ())], codebook_dim)
        self.inner = built
        self.inner.counts_usage = False  # counted here, with the geometry's codes
        self.levels = None if levels is None else list(levels)
        self.books, self.width = books, codebook_dim - len(GEOMETRY)
        self.moves_rows, self.trains_rows = built.moves_rows, built.trains_rows
        self.semantic_channels = built.semantic_channels
        if self.levels is None:
            self.discrete = self.reads = self.generates = False
        if hasattr(built, "start_kmeans"):
            self.start_kmeans = self._start_kmeans
        self.register_buffer("largest", torch.tensor(SCALE_RANGE[1]))
        self.register_buffer("mean_scale", torch.tensor(sum(SCALE_RANGE) / 2))

    def init_weights(self) -> None:
        super().init_weights()
        init.constant_(self.largest, SCALE_RANGE[1])
        init.constant_(self.mean_scale, sum(SCALE_RANGE) / 2)

    @property
    def codebooks(self) -> nn.Parameter | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The inner quantiser's."""
        return self.inner.codebooks

    @property
    def started(self) -> Any:
        """The inner quantiser's, if it has such a flag."""
        return getattr(self.inner, "started", False)

    @property
    def bits_per_token(self) -> float:
        """The codes' bits, and those of continuous geometry as float32."""
        return super().bits_per_token + (BITS * len(GEOMETRY) if self.levels is None else 0)

    def describe_rate(self, layout: TokenLayout) -> str:
        if self.levels is not None:
            return super().describe_rate(layout)
        own, free = super().bits_per_token, BITS * len(GEOMETRY)
        return f"{super().describe_rate(layout)}: {own:.4g} of its code, {free} of continuous geometry"

    def start_step(self, generator: torch.Generator) -> None:
        self.inner.start_step(generator)

    def forward(self, latents: Tensor, entropy: bool = False) -> QuantizerOutput:
        # training sets these from outside
        for name in ("average_over_ranks", "gather_over_ranks", "order", "frozen"):
            setattr(self.inner, name, getattr(self, name))
        features, raw = self._parts(latents)
        found = self.inner(features, entropy=entropy)
        with exact_float32(latents.device):
            codes = found.codes
            if self.levels is not None:
                cells = geometry_codes(raw, self.levels)
                codes = torch.cat([codes, cells], dim=-1)
                raw = pass_through(raw, raw_of_codes(cells, self.levels))
            values = activate(raw, self.largest)
            if self.training and not self.frozen:
                self._lower_scale(values[..., 3:].detach().mean())
            quantised = torch.cat([found.quantised, values], dim=-1)
            return QuantizerOutput(quantised, codes, found.losses, self.track_usage(codes))

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """As `Quantizer.encode`.

        Raises:
            UserError: the geometry is continuous.
        """
        self._check_discrete()
        features, raw = self._parts(latents)
        with exact_float32(latents.device):
            cells = geometry_codes(raw, self.levels or ())
        return torch.cat([self.inner.encode(features), cells], dim=-1)

    def embed(self, codes: Tensor) -> Tensor:
        self._check_discrete()
        with exact_float32(codes.device):
            values = activate(raw_of_codes(codes[..., self.books :], self.levels or ()), self.largest)
        return torch.cat([self.inner.embed(codes[..., : self.books]), values], dim=-1)

    @torch.no_grad()
    def quantise(self, latents: Tensor) -> Tensor:
        if self.levels is not None:
            return self.embed(self.encode(latents))
        features, raw = self._parts(latents)
        with exact_float32(latents.device):
            return torch.cat([self.inner.embed(self.inner.encode(features)), activate(raw, self.largest)], -1)

    def split(self, latents: Tensor) -> Tensor:
        """(..., D) -> (..., feature books, their width)."""
        return self.inner.split(self._parts(latents)[0])

    def code_table(self) -> Tensor | None:
        rows = self.inner.code_table()
        if rows is None or self.levels is None:
            return None
        if self.inner.row_norm != "none":
            blocks = self.inner.row_blocks if self.inner.row_norm == "blocks" else 1
            rows = normalise_blocks(rows, blocks)
        table = rows.new_zeros(len(self.code_sizes), rows.shape[1], self.latent_dim)
        width = rows.shape[-1]
        for book, own in enumerate(rows):
            start = 0 if self.inner.sums_rows else book * width
            table[book, :, start : start + width] = own
        for number, count in enumerate(self.levels):
            cells = torch.arange(count, device=rows.device)[:, None].expand(-1, len(GEOMETRY))
            values = activate(raw_of_codes(cells, [count] * len(GEOMETRY)), self.largest)
            table[self.books + number, :count, self.width + number] = values[:, number]
        return table

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        inner = {f"inner.{name}": tensor for name, tensor in self.inner.fingerprint_tensors().items()}
        return inner | {"largest": self.largest}  # the values of codes depend on it

    def reset_codes(self, unused: Tensor, rows: Tensor, write: WriteRows | None = None) -> None:
        """As `Quantizer.reset_codes`; `unused` (K, V) may name entries of the feature books alone."""
        self.inner.reset_codes(unused[: self.books], rows, write)

    def _start_kmeans(self, latents: Tensor, indices: Tensor, iterations: int = 10) -> None:
        start: Callable[..., None] = self.inner.start_kmeans  # pyright: ignore
        start(self._parts(latents)[0], indices, iterations)

    def _build_inner(
        self, inner: str, options: dict[str, Any], books: int, entries: int, codebook_dim: int
    ) -> Quantizer:
        """
        Raises:
            UserError: the inner quantiser has no such option, or the features' width does not suit it.
        """
        kind: Any = self.inner_kinds[inner]  # subclasses have another constructor than the base class
        check_quantizer_options("quantizer_options.inner", inner, kind, options)
        width = codebook_dim - len(GEOMETRY)
        summed = options.get("kind") == "ResidualVQ"
        if not summed and width % books:
            raise UserError(
                f"codebook_dim = {codebook_dim}: the {width} feature channels beside 5 of geometry do not "
                f"divide into {books} codebooks."
            )
        return kind(books, entries, width if summed else width // books, **options)

    def _parts(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """(..., D) -> features (..., F), raw geometry (..., 5), float32."""
        features, raw = latents.float().split([self.width, len(GEOMETRY)], dim=-1)
        return features, raw

    def _check_discrete(self) -> None:
        if not self.discrete:
            raise UserError(self.no_codes)

    @torch.no_grad()
    def _lower_scale(self, mean: Tensor) -> None:
        """Move the upper bound of the scales after a step whose scales have this mean."""
        if self.average_over_ranks is not None:
            mean = self.average_over_ranks(mean)
        self.mean_scale.mul_(SCALE_DECAY).add_((1 - SCALE_DECAY) * mean)
        excess = self.mean_scale - (self.largest + SCALE_RANGE[0]) / 2
        self.largest.sub_(SCALE_RATE * excess.clamp(min=SCALE_EXCESS)).clamp_(min=SCALE_END)


def activate(
    raw: Tensor, largest: Tensor | float = SCALE_RANGE[1], smallest: float = SCALE_RANGE[0]
) -> Tensor:
    """(..., 5) raw numbers -> values: x and y in (-1, 1), rotation in (0, pi), scales between the two bounds.

    Args:
        largest, smallest: bounds of the scales in pixels.
    """
    unit = raw.clamp(-RAW_LIMIT, RAW_LIMIT).sigmoid()
    xy, rotation, scale = unit.split([2, 1, 2], dim=-1)
    return torch.cat([2 * xy - 1, torch.pi * rotation, smallest + (largest - smallest) * scale], dim=-1)


def geometry_codes(raw: Tensor, levels: Sequence[int]) -> Tensor:
    """(..., 5) raw numbers -> (..., 5) int64: the cell of each sigmoid among so many `levels`."""
    count = torch.tensor(levels, device=raw.device)
    unit = raw.clamp(-RAW_LIMIT, RAW_LIMIT).sigmoid()
    return (unit * count).floor().long().minimum(count - 1)


def raw_of_codes(codes: Tensor, levels: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """(..., 5) codes -> (..., 5) raw numbers at the middle of their cells."""
    count = torch.tensor(levels, device=codes.device)
    return torch.logit((codes.to(dtype) + 0.5) / count)


def _check(
    inner: str,
    kinds: dict[str, type[Quantizer]],
    books: int,
    entries: int,
    codebook_dim: int,
    levels: Sequence[int] | None,
) -> None:
    """
    Raises:
        UserError: an option is not valid, or sizes do not suit it.
    """
    if not isinstance(inner, str) or inner not in kinds:
        raise UserError(f"quantizer_options.inner = {inner!r}." + did_you_mean(str(inner), kinds))
    if levels is not None:
        if not isinstance(levels, list | tuple):
            raise UserError(f"quantizer_options.levels is {levels!r}: expected 5 numbers, or null.")
        whole = all(isinstance(count, int) and not isinstance(count, bool) for count in levels)
        if len(levels) != len(GEOMETRY) or not whole or min(levels) < 2 or max(levels) > 4096:
            raise UserError(
                f"quantizer_options.levels is {list(levels)}: expected 5 numbers from 2 to 4096, for "
                f"{', '.join(GEOMETRY)}; or null for continuous geometry."
            )
        if max(levels) > entries:
            raise UserError(
                f"quantizer_options.levels is {list(levels)}, but codebook_size = {entries} must be at least "
                "the largest of them."
            )
    if books < 1:
        raise UserError(
            f"num_codebooks = {books + len(GEOMETRY) * (levels is not None)}: a token has "
            f"{'1 or more' if levels is None else '5 codes of its geometry and 1 or more'} of its feature."
        )
    if codebook_dim <= len(GEOMETRY):
        raise UserError(
            f"codebook_dim = {codebook_dim}: a token has 5 numbers of geometry beside its features, so it "
            "must be at least 6."
        )
