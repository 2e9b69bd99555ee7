"""Multi-codebook quantisation: a latent is cut into K chunks, each quantised by its own sub-codebook (arXiv
2502.20321, section 3.2).

B batch, N visual tokens, K sub-codebooks, V entries per sub-codebook, C width of one code, R = B*N rows.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

from open_unitok.core.errors import UserError

from ..precision import exact_float32
from .base import (
    Quantizer,
    QuantizerOutput,
    blocks_of_rows,
    check_gradient,
    look_up,
    pass_through,
    search_by_product,
)

COMMITMENT = 0.25  # weight of the commitment loss (latents to codes) relative to the codebook loss
TEMPERATURE = 0.01  # of the soft assignment in the entropy loss


class MultiCodebookQuantizer(Quantizer):
    """The entry of largest cosine similarity in each of K sub-codebooks, in float32 even under autocast.

    Losses: "vq" (commitment included), "entropy" (0 unless computed), both means over the sub-codebooks, and
    "disentangle" if requested. FQGAN (arXiv 2411.16681) is this quantiser with K = 2 or 3, `unit_rows`,
    `disentangle`, an `entropy_eps` of 1e-5 and losses that are sums over the sub-codebooks: K times the
    weights.

    Args:
        gradient: see `pass_through`; "straight_through" as published.
        entropy_eps: inside the logarithm of the mean assignment.
        disentangle: compute FQGAN's disentanglement loss, see `disentangle_loss`; training sets the attribute
            where losses.disentangle > 0.
        unit_rows: rows start at unit norm, which slows them down against UniTok's short ones.
    """

    row_norm = "unit"
    codebooks: nn.Parameter

    def __init__(
        self,
        num_codebooks: int,
        codebook_size: int,
        codebook_dim: int,
        gradient: str = "straight_through",
        entropy_eps: float = 1e-7,
        disentangle: bool = False,
        unit_rows: bool = False,
    ) -> None:
        super().__init__([codebook_size] * num_codebooks, num_codebooks * codebook_dim)
        self.gradient, self.entropy_eps = check_gradient(gradient), entropy_eps
        self.disentangle, self.unit_rows = disentangle, unit_rows
        if disentangle:
            check_disentangle(num_codebooks)
        self.codebooks = nn.Parameter(torch.empty(num_codebooks, codebook_size, codebook_dim))
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        bound = 1 / (36 * self.codebooks.shape[2] ** 0.5)  # as the published code, for rows of any width
        if self.unit_rows:
            rows = torch.empty_like(self.codebooks).uniform_(-bound, bound)
            init.copy_(self.codebooks, F.normalize(rows, dim=-1))
        else:
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
            passed = pass_through(features, rows, self.gradient)
            if self.disentangle:
                losses["disentangle"] = disentangle_loss(passed)
            quantised = passed.flatten(-2)
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

    def stored_rows(self) -> torch.Tensor:
        """(K, V, C) rows before normalisation; a subclass may compute them."""
        return self.codebooks

    def _rows(self, codes: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., K, C), unit norm."""
        # normalise after the lookup: a batch has fewer rows than the table
        return F.normalize(look_up(codes, self.stored_rows()).float(), dim=-1)

    @torch.no_grad()
    def _search(self, features: torch.Tensor) -> torch.Tensor:
        """(B, N, K, C) -> (B, N, K): the entry of largest cosine similarity, the first among equals."""
        return search_by_product(features, F.normalize(self.stored_rows().float(), dim=-1))

    def _entropy(self, features: torch.Tensor) -> torch.Tensor:
        """Mean entropy of the soft assignments minus entropy of their mean, averaged over the sub-codebooks.

        Low if each latent has one clear code and the batch uses all codes. The backward pass recomputes the
        similarities of each block: keeping them would take B*N*K*V floats.
        """
        table = F.normalize(self.stored_rows().float(), dim=-1)
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
        of_mean = -(mean * torch.log(mean + self.entropy_eps)).sum(dim=-1).mean()
        return per_latent - of_mean


def disentangle_loss(vectors: torch.Tensor) -> torch.Tensor:
    """Mean squared cosine of all K(K-1)/2 pairs of (..., K, C) vectors (arXiv 2411.16681, section 3.2).

    On quantised vectors its gradient reaches the latents, through the straight-through output, and no row.
    """
    books = vectors.shape[-2]
    check_disentangle(books)
    unit = F.normalize(vectors.float(), dim=-1)
    cosine = unit @ unit.mT  # (..., K, K): all pairs in one product
    first, second = torch.triu_indices(books, books, 1, device=vectors.device)
    return cosine[..., first, second].square().mean()


def check_disentangle(books: int) -> None:
    """Raise UserError where there is no pair of sub-codebooks."""
    if books < 2:
        raise UserError(
            "The disentanglement loss compares sub-codebooks, but num_codebooks is 1: set losses.disentangle "
            "to 0, or num_codebooks to 2 or more."
        )


def _soft_assignment(features: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, C), (V, C) -> the summed entropy of the R soft assignments, and their summed probabilities (V,)."""
    # |x - e|^2 by its expansion: a matrix product instead of a (R, V, C) difference
    distance = features.square().sum(-1, keepdim=True) + table.square().sum(-1) - 2 * features @ table.T
    logs = torch.log_softmax(-distance / TEMPERATURE, dim=-1)
    probabilities = logs.exp()
    return -(probabilities * logs).sum(), probabilities.sum(dim=0)
