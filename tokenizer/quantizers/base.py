"""The interface of every quantiser: latents to codes and back.

B batch, N visual tokens, K codes per token, V entries of a code, C width of one row of the code table.
"""

import functools
import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from open_unitok.core.errors import UserError

from ..token_layout import TokenLayout

SIMILARITY_BLOCK = 2**22  # maximum number of similarities in memory: 16 MiB of float32
GRADIENTS = ("straight_through", "rotation")
WriteRows = Callable[[nn.Parameter, Tensor, Tensor], object]


class QuantizerOutput(NamedTuple):
    """Result of `Quantizer.forward`."""

    quantised: Tensor  # (B, N, latent_dim) float32; gradients pass straight through to the latents
    codes: Any  # (B, N, K) int64; None without codes
    losses: dict[str, Tensor]  # scalars by name; the training config has a weight of the same name for each
    usage: Tensor  # (K,) float32: per cent of the entries used in this batch


class Quantizer(nn.Module):
    """Base class. A new quantiser is one file with a subclass and one entry of `QUANTIZERS`.

    `QUANTIZERS[name](num_codebooks, codebook_size, codebook_dim, **quantizer_options)` builds it from the
    config's fields. A subclass implements `forward`, `encode`, `embed` and `split`, and sets `row_norm`; one
    that keeps its rows in `codebooks` inherits the rest.

    Attributes:
        latent_dim: width of the latents it quantises.
        semantic_channels: those of the quantised latents that a teacher's head reads; None = all.
        decoded_channels: those that the up projection and so the pixel decoder reads; None = all.
        code_sizes: V of each of the K codes of a token.
        row_norm: normalisation by `embed` of rows of `code_table()`: "unit" = each row to unit norm, "blocks"
            = each part of a row, "none" = none.
        row_blocks: the parts for "blocks": a number of equal ones, or a list of their widths.
        sums_rows: whether `embed` adds the K rows instead of concatenating them; then C is `latent_dim`.
        own_options: type of each option that is no argument of the constructor.
        discrete: whether there are codes; without them `encode` and `embed` raise, and `quantise` works.
        no_codes: the error of what needs codes, where there are none.
        moments: whether `forward` takes (B, N, 2 * latent_dim) moments of a posterior in place of latents.
        reads, generates: whether an MLLM can read its codes as input, and can generate them; an MLLM needs
            both.
        codebooks: (K, V, C) parameter of rows that training may initialise and reset; None = no such table.
        usage, calls: running mean (K, V) of the entries' frequencies, and its number of training batches.
        counts_usage: whether `track_usage` counts; False inside a residual quantiser, which counts once.
        average_over_ranks: None, or a differentiable mean of a tensor over processes; multi-process training
            sets it, so that losses and usage refer to the global batch.
        gather_over_ranks: None, or a function (1, ...) -> (processes, ...); set as `average_over_ranks`.
        order: positions of the coming batch's images before they were reordered, or None; training sets it.
        frozen: training sets it if the quantiser must not change, also where no optimiser moves it.
        moves_rows: whether the rows move in the forward pass of training; dead-code reset is then refused.
        trains_rows: whether an optimiser moves the rows; otherwise `codebooks` requires no gradient.
    """

    row_norm: Literal["unit", "blocks", "none"]
    row_blocks: int | list[int] = 1
    own_options: ClassVar[Mapping[str, Any]] = {}
    sums_rows: bool = False
    moves_rows: bool = False
    trains_rows: bool = True
    discrete: bool = True
    no_codes: str = ""
    moments: bool = False
    reads: bool = True
    generates: bool = True

    latent_dim: int
    semantic_channels: list[int] | None = None
    decoded_channels: list[int] | None = None
    code_sizes: list[int]
    codebooks: nn.Parameter | None
    usage: Tensor
    calls: Tensor

    def __init__(self, code_sizes: Sequence[int], latent_dim: int) -> None:
        super().__init__()
        self.code_sizes, self.latent_dim = list(code_sizes), latent_dim
        self.register_buffer("usage", torch.zeros(len(code_sizes), max(code_sizes, default=0)))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_parameter("codebooks", None)
        self.counts_usage = True
        self.average_over_ranks: Callable[[Tensor], Tensor] | None = None
        self.gather_over_ranks: Callable[[Tensor], Tensor] | None = None
        self.order: Sequence[int] | None = None
        self.frozen = False

    def init_weights(self) -> None:
        init.zeros_(self.usage)
        init.zeros_(self.calls)

    @abstractmethod
    def forward(self, latents: Tensor, entropy: bool = False) -> QuantizerOutput:
        """Quantise (B, N, latent_dim) latents with gradients; `entropy` adds an entropy loss."""

    @abstractmethod
    def encode(self, latents: Tensor) -> Tensor:
        """(B, N, latent_dim) latents -> (B, N, K) int64 codes, without losses and statistics."""

    @abstractmethod
    def embed(self, codes: Tensor) -> Tensor:
        """(..., K) codes -> (..., latent_dim) float32, unchecked; read by pixel decoder and image head."""

    @torch.no_grad()
    def quantise(self, latents: Tensor) -> Tensor:
        """(B, N, latent_dim) latents -> the same, as the decoder reads them; no gradients, no statistics."""
        return self.embed(self.encode(latents))

    @abstractmethod
    def split(self, latents: Tensor) -> Tensor:
        """(..., latent_dim) latents -> (..., K, C): the vectors that rows are compared with and reset to."""

    def start_step(self, generator: torch.Generator) -> None:
        """Sample what holds for a whole training step; `generator` is the same on every rank."""

    @property
    def bits_per_token(self) -> float:
        """Bits per visual token: the sum of log2(V) over its codes."""
        return sum(map(math.log2, self.code_sizes))

    def describe_rate(self, layout: TokenLayout) -> str:
        """Tokens of an image and the bits of each, in words; "" without bits."""
        bits = self.bits_per_token
        return f"{self.num_tokens(layout)} visual tokens of {bits:.4g} bits" if bits else ""

    def num_tokens(self, layout: TokenLayout) -> int:
        """N of an image with this layout; a multi-scale quantiser has more than the grid."""
        return layout.num_tokens

    def num_embedded(self, layout: TokenLayout) -> int:
        """Number of vectors that `embed` makes of the N codes of an image; an MLLM reads as many."""
        return self.num_tokens(layout)

    def code_table(self) -> Tensor | None:
        """(K, max V, C) float32 rows as stored, padded with zeros.

        `embed` equals a lookup in it, normalised by `row_norm` and concatenated over K, or added
        (`sums_rows`). None if the quantiser has no such table.
        """
        return None if self.codebooks is None else self.codebooks.detach().float()

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        """The tensors that determine the codes, by their names in the tokenizer's fingerprint."""
        return dict(self.named_parameters())

    def reset_latents(self, latents: Tensor) -> Tensor:
        """(B, N', latent_dim) vectors that entries are reset to, after `forward` of (B, N, latent_dim)."""
        return latents

    def reset_codes(self, unused: Tensor, rows: Tensor, write: WriteRows | None = None) -> None:
        """Replace entries of the table.

        Args:
            unused: (K, V) bool, True where an entry is replaced.
            rows: (number of True, C) in the order of `unused.nonzero()`, from `split`.
            write: (parameter, mask, rows) -> None, for parameters that a training engine has partitioned
                (ZeRO-3); None writes in place.

        Raises:
            UserError: this quantiser has no table of rows.
        """
        if self.codebooks is None:
            raise UserError(
                f"{type(self).__name__} has no codebook rows to initialise or reset: set "
                "codebooks.init_images and codebooks.reset_after to 0."
            )
        if write is not None:
            write(self.codebooks, unused, rows)
            return
        with torch.no_grad():
            self.codebooks[unused] = rows.to(self.codebooks)

    @torch.no_grad()
    def track_usage(self, codes: Tensor) -> Tensor:
        """(K,) per cent of entries that (B, N, K) codes use; in training, update running frequencies."""
        if not self.counts_usage:
            return self.usage.new_zeros(len(self.code_sizes))
        # One flat histogram over all books; book k starts at k * size.
        size = self.usage.shape[1]
        offsets = torch.arange(len(self.code_sizes), device=codes.device) * size
        index = (codes + offsets).flatten()
        count = torch.zeros(self.usage.numel(), device=codes.device).scatter_add_(
            0, index, torch.ones(index.shape, device=codes.device)
        )
        frequency = count.view_as(self.usage) / (codes.shape[0] * codes.shape[1])
        if self.average_over_ranks is not None:
            frequency = self.average_over_ranks(frequency)
        if self.training:
            # Published moving average: decay 0 for the first batch, 0.9 up to batch 100, then 0.99.
            early = torch.where(self.calls == 0, 0.0, 0.9)
            decay = torch.where(self.calls < 100, early, 0.99).to(self.usage.dtype)
            self.usage.copy_(decay * self.usage + (1 - decay) * frequency)
            self.calls += 1
        # An entry counts as used above 1 % of its frequency under uniform use, 1 / V.
        used = [(row > 0.01 / own).sum() / own for row, own in zip(frequency, self.code_sizes)]
        return 100 * torch.stack(used)


def check_gradient(gradient: str) -> str:
    """
    Raises:
        UserError: not one of `GRADIENTS`.
    """
    if gradient not in GRADIENTS:
        raise UserError(f"quantizer_options.gradient is {gradient!r}: it must be {' or '.join(GRADIENTS)}.")
    return gradient


def pass_through(latents: Tensor, rows: Tensor, gradient: str = "straight_through") -> Tensor:
    """The value of the rows (..., C), with a gradient to the latents (..., C).

    "straight_through" passes the gradient unchanged. "rotation" (the rotation trick, arXiv 2410.06424) turns
    and scales it as the latent is turned and scaled onto its row.
    """
    if gradient == "straight_through":
        return (rows - latents).detach() + latents
    z, row = latents.detach(), rows.detach()
    u, q = F.normalize(z, dim=-1), F.normalize(row, dim=-1)
    w = F.normalize(u + q, dim=-1)
    scale = row.norm(dim=-1, keepdim=True) / z.norm(dim=-1, keepdim=True).clamp(min=1e-6)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dim=-1, keepdim=True)

    # two reflections; all factors but the latents are constants
    turned = latents - 2 * dot(latents, w) * w + 2 * dot(latents, u) * q
    found = scale * turned
    return found + (rows - found).detach()  # the exact value of the rows


def option_names(kind: type[Quantizer]) -> list[str]:
    """The keyword arguments of a quantiser's constructor, and of what it builds (`own_options`)."""
    parameters = list(inspect.signature(kind).parameters.values())[3:]  # the first three are the sizes
    named = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
    return [*named, *kind.own_options]


def normalise_blocks(rows: Tensor, blocks: int | Sequence[int]) -> Tensor:
    """(..., C) -> the same, each part at unit norm; `blocks` is `Quantizer.row_blocks`."""
    sizes = rows.shape[-1] // blocks if isinstance(blocks, int) else list(blocks)
    return torch.cat([F.normalize(part, dim=-1) for part in rows.split(sizes, dim=-1)], dim=-1)


def search_codes(features: Tensor, num_entries: int, search: Callable[[int, Tensor], Tensor]) -> Tensor:
    """(B, N, K, C) -> (B, N, K) codes; `search(book, rows)` finds the (R,) codes of (R, C) rows of a book."""
    found = [search(book, rows) for book, rows in blocks_of_rows(features, num_entries)]
    batch, length, books, _ = features.shape
    return torch.cat(found).view(books, batch, length).permute(1, 2, 0).contiguous()


def search_by_product(features: Tensor, table: Tensor) -> Tensor:
    """(B, N, K, C), (K, V, C) -> (B, N, K): the entry of largest inner product, the first among equals."""
    return search_codes(features, table.shape[1], lambda book, rows: (rows @ table[book].T).argmax(dim=-1))


def look_up(codes: Tensor, table: Tensor) -> Tensor:
    """(..., K) codes -> (..., K, C) rows of the (K, V, C) table."""
    # one lookup in a flat table of all books; book k starts at row k * V
    offsets = torch.arange(len(table), device=table.device) * table.shape[1]
    return F.embedding(codes + offsets, table.flatten(0, 1))


def blocks_of_rows(features: Tensor, num_entries: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (book, (R, C) rows of that book) from (B, N, K, C) features, such that R * V is at most
    `SIMILARITY_BLOCK`."""
    by_book = features.flatten(0, 1).transpose(0, 1).contiguous()  # (K, B*N, C)
    step = max(SIMILARITY_BLOCK // num_entries, 1)
    for book, rows in enumerate(by_book):
        for block in rows.split(step):
            yield book, block


@functools.lru_cache(maxsize=16)
def places_before(order: tuple[int, ...], device: torch.device) -> Tensor:
    """(B,) indices that undo a reordering: image i of the batch was number `order[i]` before."""
    # the same order in every step: a new tensor each time would make the host wait for a GPU
    return torch.tensor(order).argsort().to(device)
