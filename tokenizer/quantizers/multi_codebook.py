"""Multi-codebook quantisation: a latent is cut into K chunks, each quantised by its own sub-codebook (arXiv
2502.20321, section 3.2).

B batch, N visual tokens, K sub-codebooks, V entries per sub-codebook, C width of one code, R = B*N rows.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

from ..precision import exact_float32
from .base import Quantizer, QuantizerOutput, blocks_of_rows, check_gradient, pass_through, search_codes

COMMITMENT = 0.25  # weight of the commitment loss (latents to codes) relative to the codebook loss
TEMPERATURE = 0.01  # of the soft assignment in the entropy loss


class MultiCodebookQuantizer(Quantizer):
    """The entry of largest cosine similarity in each of K sub-codebooks, in float32 even under autocast.

    Losses: "vq" (commitment included) and "entropy" (0 unless computed).

    Args:
        gradient: see `pass_through`; "straight_through" as published.
    """

    row_norm = "unit"
    codebooks: nn.Parameter

    def __init__(
        self,
        num_codebooks: int,
        codebook_size: int,
        codebook_dim: int,
        gradient: str = "straight_through",
    ) -> None:
        super().__init__([codebook_size] * num_codebooks, num_codebooks * codebook_dim)
        self.gradient = check_gradient(gradient)
        self.codebooks = nn.Parameter(torch.empty(num_codebooks, codebook_size, codebook_dim))
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        bound = 1 / (36 * self.codebooks.shape[2] ** 0.5)  # as the published code, for rows of any width
        init.uniform_(self.codebooks, -bound, bound)

    def forward(self, latents: torch.Tensor, entropy: bool = False) -> QuantizerOutput:
        with exact_float32(latents.device):
            features = self.split(latents)
            codes = self._search(features.detach())
            rows = self._rows(codes)
            losses = {
                "vq": COMMITMENT * F.mse_loss(features, rows.detach()) + F.mse_loss(rows, features.detach()),
                "entropy": self._entropy(features) if entropy else features.new_zeros(()),
            }
            quantised = pass_through(features, rows, self.gradient).flatten(-2)
            return QuantizerOutput(quantised, codes, losses, self.track_usage(codes))

    @torch.no_grad()
    def encode(self, latents: torch.Tensor) -> torch.Tensor:
        with exact_float32(latents.device):
            return self._search(self.split(latents))

    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        return self._rows(codes).flatten(-2)

    def split(self, latents: torch.Tensor) -> torch.Tensor:
        """(..., K*C) -> (..., K, C), unit norm."""
        return F.normalize(latents.float().unflatten(-1, (len(self.code_sizes), -1)), dim=-1)

    def _rows(self, codes: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., K, C), unit norm."""
        books, entries, _ = self.codebooks.shape
        # One lookup in a flat table of all books; book k starts at row k * entries.
        offsets = torch.arange(books, device=self.codebooks.device) * entries
        return F.normalize(F.embedding(codes + offsets, self.codebooks.flatten(0, 1).float()), dim=-1)

    @torch.no_grad()
    def _search(self, features: torch.Tensor) -> torch.Tensor:
        """(B, N, K, C) -> (B, N, K): the entry of largest cosine similarity, the first among equals."""
        table = F.normalize(self.codebooks.float(), dim=-1)
        return search_codes(
            features, table.shape[1], lambda book, rows: torch.argmax(rows @ table[book].T, dim=-1)
        )

    def _entropy(self, features: torch.Tensor) -> torch.Tensor:
        """Mean entropy of the soft assignments minus entropy of their mean, averaged over the sub-codebooks.

        Low if each latent has one clear code and the batch uses all codes. The backward pass recomputes the
        similarities of each block: keeping them would take B*N*K*V floats.
        """
        table = F.normalize(self.codebooks.float(), dim=-1)
        books, entries, _ = table.shape
        count = features.shape[0] * features.shape[1]
        per_latent = features.new_zeros(())
        means = [features.new_zeros(entries) for _ in range(books)]  # mean assignment of each book
        for book, block in blocks_of_rows(features, entries):
            entropy, probabilities = checkpoint(_soft_assignment, block, table[book], use_reentrant=False)
            per_latent = per_latent + entropy / (count * books)
            means[book] = means[book] + probabilities / count
        mean = torch.stack(means)
        if self.average_over_ranks is not None:  # entropy is not linear: average before the logarithm
            mean = self.average_over_ranks(mean)
        of_mean = -(mean * torch.log(mean + 1e-7)).sum(dim=-1).mean()
        return per_latent - of_mean


def _soft_assignment(features: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, C), (V, C) -> the summed entropy of the R soft assignments, and their summed probabilities (V,)."""
    # |x - e|^2 by its expansion: a matrix product instead of a (R, V, C) difference
    distance = features.square().sum(-1, keepdim=True) + table.square().sum(-1) - 2 * features @ table.T
    logs = torch.log_softmax(-distance / TEMPERATURE, dim=-1)
    probabilities = logs.exp()
    return -(probabilities * logs).sum(), probabilities.sum(dim=0)
