"""Multi-scale residual quantisation: a pyramid of grids, each coding what the coarser ones left (VAR, arXiv
2404.02905; TokenFlow, 2412.03069; CODA, 2503.17760).

B batch, S scales of s*s tokens, H x W = the finest grid, N = sum of s^2, K codes per token, D = K*C.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_unitok.core.errors import UserError, did_you_mean

from ..precision import exact_float32
from ..token_layout import TokenLayout
from .base import Quantizer, QuantizerOutput, WriteRows
from .options import check_quantizer_options

PHI_SHARE = 0.5  # phi(x) = x + PHI_SHARE * (conv(x) - x)


class ResidualQuantizer(Quantizer):
    """A pyramid over any other quantiser, which all scales share.

    At each scale the rest is averaged to s x s ("area"), quantised, upsampled to H x W (bicubic) and
    subtracted from the rest; `embed` is the sum over the scales. Codes are (B, N, K): scale after scale, each
    in raster order. Losses are means over the scales in use.

    Args:
        inner: an entry of `QUANTIZERS`; inner_options: its keyword arguments.
        scales: sides of the grids, rising; the last is that of the image's grid.
        detach: the rest carries no gradient (TokenFlow); with False later scales train earlier ones (CODA).
        shared_convolutions: number of 3x3 convolutions phi after upsampling, 0 = none. TokenFlow has 4, which
            its published configs leave out.
        scale_drop: in training, probability that a step leaves out one scale other than the first (TokenFlow:
            0.1).

    Attributes:
        grid: (H, W) of the latents.
        skip: place in `scales` of the scale that training leaves out; set by `start_step`.
    """

    inner_kinds: ClassVar[dict[str, type[Quantizer]]]  # QUANTIZERS
    generates = False  # generation writes one grid, token by token

    def __init__(
        self,
        num_codebooks: int,
        codebook_size: int,
        codebook_dim: int,
        inner: str = "multi_codebook",
        inner_options: dict[str, Any] | None = None,
        scales: Sequence[int] = (),
        detach: bool = True,
        shared_convolutions: int = 0,
        scale_drop: float = 0.0,
    ) -> None:
        self._check(inner, scales, shared_convolutions, scale_drop)
        kind: Any = self.inner_kinds[inner]  # subclasses have another constructor than the base class
        check_quantizer_options("quantizer_options.inner", inner, kind, inner_options)
        sizes = (num_codebooks, codebook_size, codebook_dim)
        built: Quantizer = kind(*sizes, **(inner_options or {}))
        super().__init__(built.code_sizes, built.latent_dim)
        self.inner = built
        self.inner.counts_usage = False  # counted here, once for all scales
        self.scales, self.detach, self.scale_drop = list(scales), detach, scale_drop
        self.grid = (self.scales[-1], self.scales[-1])
        for name in (
            "row_norm",
            "row_blocks",
            "sums_rows",
            "semantic_channels",
            "decoded_channels",
            "moves_rows",
            "trains_rows",
        ):
            setattr(self, name, getattr(built, name))
        self.reads = built.reads and not shared_convolutions  # an MLLM has the rows, not the convolutions
        if hasattr(built, "start_kmeans"):
            self.start_kmeans = built.start_kmeans
        self.skip: int | None = None
        # a separately normalised block has convolutions of its own
        self.phi = SharedConvolutions(_block_widths(built), shared_convolutions)
        self._last: Tensor | None = None

    @property
    def codebooks(self) -> nn.Parameter | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The inner quantiser's."""
        return self.inner.codebooks

    @property
    def started(self) -> Any:
        """The inner quantiser's, if it has such a flag."""
        return getattr(self.inner, "started", False)

    def _check(self, inner: str, scales: Sequence[int], convolutions: int, scale_drop: float) -> None:
        """
        Raises:
            UserError: an option is not valid.
        """
        kinds = [
            name
            for name, kind in self.inner_kinds.items()
            if kind.discrete and not issubclass(kind, ResidualQuantizer)
        ]
        if inner not in kinds:
            raise UserError(f"quantizer_options.inner = {inner!r}." + did_you_mean(inner, kinds))
        rising = all(isinstance(side, int) and side > last for last, side in zip([0, *scales], scales))
        if not scales or not rising:
            raise UserError(
                f"scales = {list(scales)}: rising sides are needed, the last of them image_size // "
                "patch_size."
            )
        if convolutions < 0:
            raise UserError(f"quantizer_options.shared_convolutions = {convolutions}: must be at least 0.")
        if not 0 <= scale_drop < 1:
            raise UserError(f"quantizer_options.scale_drop = {scale_drop}: must be in [0, 1).")
        if scale_drop and len(scales) < 3:
            raise UserError(
                f"quantizer_options.scale_drop = {scale_drop} needs 3 or more scales, not {list(scales)}: "
                "set it to 0."
            )

    def start_step(self, generator: torch.Generator) -> None:
        chance, place = torch.rand(2, generator=generator).tolist()
        # never the first scale
        self.skip = 1 + int(place * (len(self.scales) - 1)) if chance < self.scale_drop else None
        self.inner.start_step(generator)

    def forward(self, latents: Tensor, entropy: bool = False) -> QuantizerOutput:
        """As `Quantizer.forward`, for (B, H*W, D) latents in raster order; codes are those of the scales in
        use."""
        skip = self.skip if self.training else None
        used = [side for place, side in enumerate(self.scales) if place != skip]
        for name in ("average_over_ranks", "gather_over_ranks", "order", "frozen"):
            setattr(self.inner, name, getattr(self, name))  # training sets them from outside
        if self.training:  # the inner quantiser's dropout follows from the step, which is counted here
            self.inner.calls.copy_(self.calls)
        losses: dict[str, Tensor] = {}
        with exact_float32(latents.device):

            def quantise(chunks: Tensor) -> tuple[Tensor, Tensor]:
                self._last = chunks.detach()
                found = self.inner(chunks, entropy=entropy)
                for name, loss in found.losses.items():
                    losses[name] = losses.get(name, 0) + loss / len(used)
                return found.codes, found.quantised

            codes, total = self._descend(latents, used, quantise)
        return QuantizerOutput(total, codes, losses, self.track_usage(codes))

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        def quantise(chunks: Tensor) -> tuple[Tensor, Tensor]:
            codes = self.inner.encode(chunks)
            return codes, self.inner.embed(codes)

        with exact_float32(latents.device):
            return self._descend(latents, self.scales, quantise)[0]

    def embed(self, codes: Tensor) -> Tensor:
        """(B, N, K) codes -> (B, H*W, D), the sum over the scales; N may end after any scale.

        Raises:
            UserError: another number of tokens.
        """
        count = self.check_length(codes.shape[-2])
        with exact_float32(codes.device):
            lengths = [side * side for side in self.scales[:count]]
            parts = self.inner.embed(codes).split(lengths, dim=-2)
            ups = [self._upsample(part, place, self.scales) for place, part in enumerate(parts)]
            return _to_tokens(torch.stack(ups).sum(dim=0))

    def split(self, latents: Tensor) -> Tensor:
        return self.inner.split(latents)

    def num_tokens(self, layout: TokenLayout) -> int:
        return sum(side * side for side in self.scales)

    def num_embedded(self, layout: TokenLayout) -> int:
        return layout.num_tokens

    def check_length(self, num_tokens: int) -> int:
        """The number of scales that the first `num_tokens` tokens are.

        Raises:
            UserError: they end within a scale.
        """
        ends = np.cumsum([side * side for side in self.scales]).tolist()
        if num_tokens not in ends:
            first = f" (or {', '.join(map(str, ends[:-1]))} of the first scales)" if len(ends) > 1 else ""
            raise UserError(
                f"codes have {num_tokens} tokens; the scales {self.scales} take {ends[-1]}{first}."
            )
        return ends.index(num_tokens) + 1

    def code_table(self) -> Tensor | None:
        return self.inner.code_table()

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        inner = {f"inner.{name}": tensor for name, tensor in self.inner.fingerprint_tensors().items()}
        return dict(self.named_parameters()) | inner  # rows may also be buffers

    def reset_latents(self, latents: Tensor) -> Tensor:
        """The rest that the last scale in use quantised."""
        return latents if self._last is None else self._last

    def reset_codes(self, unused: Tensor, rows: Tensor, write: WriteRows | None = None) -> None:
        self.inner.reset_codes(unused, rows, write)

    def _descend(
        self, latents: Tensor, used: Sequence[int], quantise: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """(B, H*W, D) -> codes (B, sum of s^2, K) and the sum of all scales (B, H*W, D).

        `quantise` makes codes and rows from the (B, s*s, D) tokens of a scale.
        """
        rest = latents.float().transpose(1, 2).unflatten(-1, self.grid)  # (B, D, H, W)
        codes, total = [], torch.zeros_like(rest)
        for place, side in enumerate(used):
            found, rows = quantise(_to_tokens(F.interpolate(rest, (side, side), mode="area")))
            up = self._upsample(rows, place, used)
            total = total + up
            rest = rest - (up.detach() if self.detach else up)
            codes.append(found)
        return torch.cat(codes, dim=1), _to_tokens(total)

    def _upsample(self, rows: Tensor, place: int, used: Sequence[int]) -> Tensor:
        """(B, s*s, D) rows of the scale at `place` of `used` -> (B, D, H, W)."""
        up = upsample_scale(rows, used[place], self.grid)
        return self.phi(up, place / max(len(used) - 1, 1))


class SharedConvolutions(nn.Module):
    """phi of VAR and TokenFlow: half a 3x3 convolution, half the identity, for each block of channels.

    A scale takes the convolution whose tick is nearest to its relative place in the list.
    """

    def __init__(self, widths: Sequence[int], count: int) -> None:
        super().__init__()
        self.widths = list(widths)
        self.convolutions = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for width in widths) for _ in range(count)
        )
        edge = 1 / 12 if count == 4 else 1 / (2 * max(count, 1))
        # float64: rounding decides ties, as in the published code
        self.ticks = np.linspace(edge, 1 - edge, count)

    def init_weights(self) -> None:
        for convolutions in self.convolutions:
            for convolution in convolutions:  # pyright: ignore
                convolution.reset_parameters()

    def forward(self, grid: Tensor, place: float) -> Tensor:
        """(B, D, H, W) of the scale at `place`, from 0 to 1, in the list."""
        if not len(self.convolutions):
            return grid
        parts = grid.split(self.widths, dim=1)
        convolutions: Any = self.convolutions[self.choose(place)]
        mixed = [part * (1 - PHI_SHARE) + PHI_SHARE * conv(part) for conv, part in zip(convolutions, parts)]
        return torch.cat(mixed, dim=1)

    def choose(self, place: float) -> int:
        """The number of the convolution for a place from 0 to 1."""
        return int(np.abs(self.ticks - place).argmin())


def upsample_scale(rows: Tensor, side: int, grid: tuple[int, int]) -> Tensor:
    """(B, s*s, D) rows of a scale -> (B, D, H, W)."""
    up = rows.transpose(1, 2).unflatten(-1, (side, side))
    return F.interpolate(up, grid, mode="bicubic", align_corners=False)


def sum_scales(rows: Tensor, scales: Sequence[int]) -> Tensor:
    """(B, N, D) rows of all scales -> (B, s*s, D), their sum on the grid of the last one."""
    parts = rows.split([side * side for side in scales], dim=1)
    grid = (scales[-1], scales[-1])
    ups = [upsample_scale(part, side, grid) for part, side in zip(parts, scales)]
    return _to_tokens(torch.stack(ups).sum(dim=0))


def next_scale_inputs(rows: Tensor, scales: Sequence[int], again: int | None = None) -> Tensor:
    """(B, N, D) rows of all scales -> (B, N - s1*s1, D): what a decoder of the next scale reads (TokenFlow).

    For each scale but the first, the sum of all coarser ones, upsampled from one scale to the next: not
    `sum_scales`, which upsamples each scale once.

    Args:
        again: a scale from 1 to S - 1, counted from 0, of which the rows are a first guess and part of its
            input.
    """
    parts = rows.split([side * side for side in scales], dim=1)
    total, found = parts[0], []
    for place in range(1, len(scales)):
        side = scales[place]
        coarser = _to_tokens(upsample_scale(total, scales[place - 1], (side, side)))
        total = coarser + parts[place]
        found.append(total if place == again else coarser)
    return torch.cat(found, dim=1)


def _to_tokens(grid: Tensor) -> Tensor:
    """(B, D, h, w) -> (B, h*w, D) in raster order."""
    return grid.flatten(2).transpose(1, 2)


def _block_widths(inner: Quantizer) -> list[int]:
    if inner.row_norm != "blocks":
        return [inner.latent_dim]
    books, blocks = len(inner.code_sizes), inner.row_blocks
    width = inner.latent_dim // books
    return books * ([width // blocks] * blocks if isinstance(blocks, int) else blocks)
