"""One index for a pair of rows, a semantic and a pixel one (TokenFlow, arXiv 2412.03069, section 3.1).

B batch, N visual tokens, K codebooks, V entries per codebook, C width of one code = sum of the block widths,
R = B*N rows.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
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
    normalise_blocks,
    pass_through,
    search_by_product,
)


class SharedIndexQuantizer(Quantizer):
    """The entry of smallest distance d = sum over blocks of w |z - e|^2, each block at unit norm by itself.

    A block of weight 0 follows the choice of the others. Published: K = 1, V = 32,768, blocks of 32
    (semantic) and 8 (pixel) numbers, both of weight 1.

    Losses: "vq" = mse(rows, latents) to the rows + commitment * the same to the latents, over all C numbers;
    "entropy": mean entropy of softmax(-d / temperature) minus entropy of its mean.

    Args:
        block_widths: widths of the blocks; None = two halves.
        block_weights: w of each block; None = 1.
        decoded_blocks: numbers of the blocks that the pixel decoder reads (published: [1]); None = all.
        commitment: weight of the commitment loss (latents to codes) relative to the codebook loss.
        entropy_eps: added to the mean assignment before the logarithm.

    The first block is the semantic one, which a teacher's head reads.
    """

    row_norm = "blocks"
    codebooks: nn.Parameter

    def __init__(
        self,
        num_codebooks: int,
        codebook_size: int,
        codebook_dim: int,
        block_widths: list[int] | None = None,
        block_weights: list[float] | None = None,
        commitment: float = 0.25,
        temperature: float = 0.01,
        entropy_eps: float = 1e-5,
        gradient: str = "straight_through",
        decoded_blocks: list[int] | None = None,
    ) -> None:
        super().__init__([codebook_size] * num_codebooks, num_codebooks * codebook_dim)
        widths = (
            [codebook_dim - codebook_dim // 2, codebook_dim // 2] if block_widths is None else block_widths
        )
        weights = [1.0] * len(widths) if block_weights is None else block_weights
        _check_blocks(widths, weights, codebook_dim)
        self.row_blocks, self.block_weights = list(widths), list(weights)
        starts = range(0, self.latent_dim, codebook_dim)
        self.semantic_channels = [start + i for start in starts for i in range(widths[0])]
        if decoded_blocks is not None:
            ends = list(itertools.accumulate(widths))
            _check_decoded(decoded_blocks, len(widths))
            self.decoded_channels = [
                start + i
                for start in starts
                for b in decoded_blocks
                for i in range(ends[b] - widths[b], ends[b])
            ]
        self.commitment, self.temperature, self.entropy_eps = commitment, temperature, entropy_eps
        self.gradient = check_gradient(gradient)
        self.codebooks = nn.Parameter(torch.empty(num_codebooks, codebook_size, codebook_dim))
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        # published: uniform in +-1/V, then each half at unit norm; only the direction counts
        init.uniform_(self.codebooks, -1, 1)
        init.copy_(self.codebooks, normalise_blocks(self.codebooks.detach(), self.row_blocks))

    def forward(self, latents: Tensor, entropy: bool = False) -> QuantizerOutput:
        with exact_float32(latents.device):
            features, table = self.split(latents), self._table()
            codes = self._search(features.detach(), table.detach())
            rows = look_up(codes, table)
            losses = {
                "vq": self.commitment * F.mse_loss(features, rows.detach())
                + F.mse_loss(rows, features.detach()),
                "entropy": self._entropy(features, table) if entropy else features.new_zeros(()),
            }
            # to the unit-norm latents: the gradient passes the normalisation
            quantised = pass_through(features, rows, self.gradient).flatten(-2)
            return QuantizerOutput(quantised, codes, losses, self.track_usage(codes))

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        with exact_float32(latents.device):
            return self._search(self.split(latents), self._table())

    def embed(self, codes: Tensor) -> Tensor:
        return look_up(codes, self._table()).flatten(-2)

    def split(self, latents: Tensor) -> Tensor:
        """(..., K*C) -> (..., K, C), each block at unit norm."""
        return normalise_blocks(latents.float().unflatten(-1, (len(self.code_sizes), -1)), self.row_blocks)

    def _table(self) -> Tensor:
        return normalise_blocks(self.codebooks.float(), self.row_blocks)

    def _weigh(self, vectors: Tensor) -> Tensor:
        """(..., C) -> the same, times sqrt(w): squared distances of the result are d."""
        parts = vectors.split(self.row_blocks, dim=-1)
        return torch.cat([weight**0.5 * part for weight, part in zip(self.block_weights, parts)], dim=-1)

    @torch.no_grad()
    def _search(self, features: Tensor, table: Tensor) -> Tensor:
        """(B, N, K, C) -> (B, N, K), the first among equals.

        Smallest d = largest inner product, because all blocks have unit norm.
        """
        return search_by_product(self._weigh(features), self._weigh(table))

    def _entropy(self, features: Tensor, table: Tensor) -> Tensor:
        """Scalar; similarities are computed block by block, and again in the backward pass."""
        features, table = self._weigh(features), self._weigh(table)
        books, entries, _ = table.shape
        count = features.shape[0] * features.shape[1]
        per_latent = features.new_zeros(())
        means = [features.new_zeros(entries) for _ in range(books)]  # mean assignment of each book
        for book, block in blocks_of_rows(features, entries):
            entropy, probabilities = checkpoint(
                _soft_assignment, block, table[book], self.temperature, use_reentrant=False
            )
            per_latent = per_latent + entropy / (count * books)
            means[book] = means[book] + probabilities / count
        mean = torch.stack(means)
        if self.average_over_ranks is not None:  # entropy is not linear: average before the logarithm
            mean = self.average_over_ranks(mean)
        of_mean = -(mean * torch.log(mean + self.entropy_eps)).sum(dim=-1).mean()
        return per_latent - of_mean


def _check_blocks(widths: list[int], weights: list[float], codebook_dim: int) -> None:
    """
    Raises:
        UserError: widths or weights that do not fit each other or the width of a code.
    """
    if min(widths, default=0) < 1 or sum(widths) != codebook_dim:
        raise UserError(
            f"quantizer_options.block_widths = {widths}: expected positive widths with the sum codebook_dim "
            f"= {codebook_dim}."
        )
    if len(weights) != len(widths) or min(weights) < 0 or max(weights) <= 0:
        raise UserError(
            f"quantizer_options.block_weights = {weights}: expected {len(widths)} weights, one per block, "
            "none below 0 and at least one above."
        )


def _check_decoded(blocks: list[int], count: int) -> None:
    wrong = not isinstance(blocks, list) or not blocks or sorted(set(blocks)) != blocks
    if wrong or not all(isinstance(block, int) and 0 <= block < count for block in blocks):
        raise UserError(
            f"quantizer_options.decoded_blocks = {blocks}: expected rising numbers of blocks, 0 to "
            f"{count - 1}."
        )


def _soft_assignment(features: Tensor, table: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(R, C), (V, C) -> the summed entropy of the R soft assignments, and their summed probabilities (V,)."""
    # |x - e|^2 by its expansion: a matrix product instead of a (R, V, C) difference
    distance = features.square().sum(-1, keepdim=True) + table.square().sum(-1) - 2 * features @ table.T
    logs = torch.log_softmax(-distance / temperature, dim=-1)
    probabilities = logs.exp()
    return -(probabilities * logs).sum(), probabilities.sum(dim=0)
