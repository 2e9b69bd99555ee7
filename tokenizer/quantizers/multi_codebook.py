"""Multi-codebook quantisation: a latent is cut into K chunks, each coded by a sub-codebook of its own (arXiv
2502.20321, section 3.2).

B batch, N visual tokens, K sub-codebooks, V entries per sub-codebook, C width of one code, R = B*N rows.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

from ..precision import exact_float32

COMMITMENT = 0.25  # weight of pulling latents to codes, beside 1 for pulling codes to latents
TEMPERATURE = 0.01  # of the soft assignment in the entropy loss
SIMILARITY_BLOCK = 2**24  # most similarities held at a time: 64 MiB of float32


class QuantizerOutput(NamedTuple):
    """What quantising gives; every quantiser of this package returns the same."""

    quantised: torch.Tensor  # (B, N, K*C) float32; its gradient passes straight through to the latents
    codes: torch.Tensor  # (B, N, K) int64
    losses: dict[str, torch.Tensor]  # scalars: "vq" (commitment included), "entropy" (0 unless asked for)
    usage: torch.Tensor  # (K,) float32: per cent of the entries that this batch uses


class MultiCodebookQuantizer(nn.Module):
    """Nearest code by cosine, in each of K sub-codebooks; float32 whatever the autocast.

    Attributes:
        codebooks: (K, V, C) parameter; rows are normalised on use.
        usage, calls: running frequency (K, V) of the entries and the number of training batches it has seen.
        average_over_ranks: None, or a differentiable mean of a tensor over processes; training on several
            sets it, so that the entropy loss and the usage speak of the global batch.
    """

    usage: torch.Tensor
    calls: torch.Tensor

    def __init__(self, num_codebooks: int, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        self.codebooks = nn.Parameter(torch.empty(num_codebooks, codebook_size, codebook_dim))
        self.register_buffer("usage", torch.zeros(num_codebooks, codebook_size))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.average_over_ranks: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.init_weights()

    def init_weights(self) -> None:
        bound = 1 / (36 * self.codebooks.shape[2] ** 0.5)  # as the published code, for rows of any width
        init.uniform_(self.codebooks, -bound, bound)
        init.zeros_(self.usage)
        init.zeros_(self.calls)

    def forward(self, latents: torch.Tensor, entropy: bool = False) -> QuantizerOutput:
        """Quantise (B, N, K*C) latents; `entropy` also computes the entropy loss."""
        with exact_float32(latents.device):
            features = self._features(latents)
            codes = self._search(features.detach())
            rows = self._rows(codes)
            losses = {
                "vq": COMMITMENT * F.mse_loss(features, rows.detach()) + F.mse_loss(rows, features.detach()),
                "entropy": self._entropy(features) if entropy else features.new_zeros(()),
            }
            quantised = ((rows - features).detach() + features).flatten(-2)
            return QuantizerOutput(quantised, codes, losses, self._count(codes))

    @torch.no_grad()
    def encode(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, N, K*C) latents -> (B, N, K) codes, without losses and statistics."""
        with exact_float32(latents.device):
            return self._search(self._features(latents))

    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        """(..., K) codes -> (..., K*C) float32: the K unit-norm rows side by side; nothing is checked."""
        return self._rows(codes).flatten(-2)

    def _features(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, N, K*C) -> (B, N, K, C), unit norm."""
        return F.normalize(latents.float().unflatten(-1, (self.codebooks.shape[0], -1)), dim=-1)

    def _rows(self, codes: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., K, C), unit norm."""
        return F.normalize(F.embedding(codes + self._offsets(), self.codebooks.flatten(0, 1).float()), dim=-1)

    def _offsets(self) -> torch.Tensor:
        """Where each sub-codebook begins when all rows stand in one table; (K,)."""
        books, entries, _ = self.codebooks.shape
        return torch.arange(books, device=self.codebooks.device) * entries

    def _blocks(self, features: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """The (R, C) features of each sub-codebook, in pieces whose similarities fit in one block."""
        by_book = features.flatten(0, 1).transpose(0, 1).contiguous()  # (K, R, C)
        step = max(SIMILARITY_BLOCK // self.codebooks.shape[1], 1)
        for book, rows in enumerate(by_book):
            for piece in rows.split(step):
                yield book, piece

    @torch.no_grad()
    def _search(self, features: torch.Tensor) -> torch.Tensor:
        """(B, N, K, C) -> (B, N, K): the entry of largest cosine, the first of equals."""
        table = F.normalize(self.codebooks.float(), dim=-1)
        found = [torch.argmax(piece @ table[book].T, dim=-1) for book, piece in self._blocks(features)]
        batch, length, books, _ = features.shape
        return torch.cat(found).view(books, batch, length).permute(1, 2, 0).contiguous()

    def _entropy(self, features: torch.Tensor) -> torch.Tensor:
        """Mean entropy of the soft assignments minus entropy of their mean, averaged over the sub-codebooks.

        Low when each latent is sure of its code while the batch uses all codes. Each block's similarities are
        computed anew in the backward pass instead of being kept.
        """
        table = F.normalize(self.codebooks.float(), dim=-1)
        books, entries, _ = table.shape
        count = features.shape[0] * features.shape[1]
        sure = features.new_zeros(())
        means = [features.new_zeros(entries) for _ in range(books)]
        for book, piece in self._blocks(features):
            entropy, probabilities = checkpoint(_soft_assignment, piece, table[book], use_reentrant=False)
            sure = sure + entropy / (count * books)
            means[book] = means[book] + probabilities / count
        mean = torch.stack(means)
        if self.average_over_ranks is not None:
            mean = self.average_over_ranks(mean)
        spread = -(mean * torch.log(mean + 1e-7)).sum(dim=-1).mean()
        return sure - spread

    @torch.no_grad()
    def _count(self, codes: torch.Tensor) -> torch.Tensor:
        """(K,) per cent of entries in use in these codes; while training, the running frequencies move."""
        index = (codes + self._offsets()).flatten()
        count = torch.zeros(self.usage.numel(), device=codes.device).scatter_add_(
            0, index, torch.ones(index.shape, device=codes.device)
        )
        frequency = count.view_as(self.usage) / (codes.shape[0] * codes.shape[1])
        if self.average_over_ranks is not None:
            frequency = self.average_over_ranks(frequency)
        if self.training:
            early = torch.where(self.calls == 0, 0.0, 0.9)
            decay = torch.where(self.calls < 100, early, 0.99).to(self.usage.dtype)
            self.usage.copy_(decay * self.usage + (1 - decay) * frequency)
            self.calls += 1
        return 100 * (frequency > 0.01 / self.usage.shape[1]).float().mean(dim=-1)


def _soft_assignment(features: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, C), (V, C) -> the summed entropy of the R soft assignments, and their summed probabilities (V,)."""
    distance = features.square().sum(-1, keepdim=True) + table.square().sum(-1) - 2 * features @ table.T
    logs = torch.log_softmax(-distance / TEMPERATURE, dim=-1)
    probabilities = logs.exp()
    return -(probabilities * logs).sum(), probabilities.sum(dim=0)
