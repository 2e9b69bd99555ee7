"""Vector quantisation by Euclidean distance without normalisation (VQ-VAE, arXiv 1711.00937), in K chunks.

B batch, N visual tokens, K codebooks, V entries per codebook, C width of one code.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from open_unitok.core.errors import UserError

from ..precision import exact_float32
from .base import Quantizer, QuantizerOutput, check_gradient, pass_through, search_codes


class NearestQuantizer(Quantizer):
    """The nearest entry in each of K codebooks; neither rows nor latents are normalised.

    Args:
        commitment: weight of the commitment loss (latents to codes) relative to the codebook loss.
        gradient: see `pass_through`.
    """

    row_norm = "none"
    codebooks: nn.Parameter

    def __init__(
        self,
        num_codebooks: int,
        codebook_size: int,
        codebook_dim: int,
        commitment: float = 0.25,
        gradient: str = "straight_through",
    ) -> None:
        super().__init__([codebook_size] * num_codebooks, num_codebooks * codebook_dim)
        self.commitment, self.gradient = commitment, check_gradient(gradient)
        self.codebooks = nn.Parameter(torch.empty(num_codebooks, codebook_size, codebook_dim))
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        init.normal_(self.codebooks)

    def forward(self, latents: torch.Tensor, entropy: bool = False) -> QuantizerOutput:
        if entropy:
            raise UserError("quantizer 'nearest' has no entropy loss: set losses.entropy to 0.")
        with exact_float32(latents.device):
            chunks = self.split(latents)
            codes = self._search(chunks)
            rows = self._rows(codes)
            commitment, codebook = F.mse_loss(chunks, rows.detach()), F.mse_loss(rows, chunks.detach())
            quantised = pass_through(chunks, rows, self.gradient).flatten(-2)
            losses = {"vq": self.commitment * commitment + codebook}
            return QuantizerOutput(quantised, codes, losses, self.track_usage(codes))

    @torch.no_grad()
    def encode(self, latents: torch.Tensor) -> torch.Tensor:
        with exact_float32(latents.device):
            return self._search(self.split(latents))

    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        return self._rows(codes).flatten(-2)

    def split(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.float().unflatten(-1, (len(self.code_sizes), -1))

    def _rows(self, codes: torch.Tensor) -> torch.Tensor:
        return torch.stack(
            [F.embedding(codes[..., k], book) for k, book in enumerate(self.codebooks)], dim=-2
        )

    @torch.no_grad()
    def _search(self, chunks: torch.Tensor) -> torch.Tensor:
        return search_by_distance(chunks, self.codebooks)


def search_by_distance(chunks: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """(B, N, K, C), (K, V, C) -> (B, N, K): the nearest entry, the first among equals."""
    # argmin |x - e|^2 = argmin |e|^2 - 2 x e, because |x|^2 is the same for all entries
    norms = table.square().sum(dim=-1)  # (K, V)
    return search_codes(
        chunks,
        norms.shape[1],
        lambda book, rows: (norms[book] - 2 * rows @ table[book].T).argmin(dim=-1),
    )
