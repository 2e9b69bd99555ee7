"""Index backpropagation quantisation (IBQ, arXiv 2412.02692): the decoder's gradient reaches every row
through the softmax over all similarities.

B batch, N visual tokens, K codebooks, V entries per codebook, C width of one code, R = B*N rows.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..precision import exact_float32
from .base import Quantizer, QuantizerOutput, look_up, search_by_product
from .softmax_assignment import assign_by_softmax


class IBQQuantizer(Quantizer):
    """The entry of largest inner product in each of K codebooks; published: K = 1, V = 16,384, C = 256.

    The output is the chosen row in value. Its gradient reaches the latents, and all V rows, through the
    softmax p of the similarities alone: there is no straight-through path, so a one-hot p passes nothing on.

    Losses: "vq" = through * mse(output, latents), which is differentiated on both sides,
    + commitment * mse(rows, latents), latents to rows, + codebook * mse(rows, latents), rows to latents; the
    published code weighs the rows' term by .25, not the latents' as the paper prints it. "entropy": mean
    entropy of the assignments at `temperature` minus entropy of their mean (published weight .05). Both are
    means over the books.

    Args:
        normalize: unit-norm latents and rows, which is not published: similarities in [-1, 1] make p nearly
            uniform, and little of the gradient arrives (a twentieth at 8 x 4096 x 8).
    """

    row_norm = "none"
    codebooks: nn.Parameter

    def __init__(
        self,
        num_codebooks: int,
        codebook_size: int,
        codebook_dim: int,
        through: float = 1.0,
        commitment: float = 1.0,
        codebook: float = 0.25,
        temperature: float = 0.01,
        entropy_eps: float = 1e-5,
        normalize: bool = False,
    ) -> None:
        super().__init__([codebook_size] * num_codebooks, num_codebooks * codebook_dim)
        self.through, self.commitment, self.codebook = through, commitment, codebook
        self.temperature, self.entropy_eps, self.normalize = temperature, entropy_eps, normalize
        if normalize:
            self.row_norm = "unit"  # pyright: ignore
            warnings.warn(
                "quantizer ibq with normalize: the softmax of unit-norm vectors is nearly uniform, so the "
                "encoder learns little from the decoder; the published rule does not normalise.",
                stacklevel=2,
            )
        self.codebooks = nn.Parameter(torch.empty(num_codebooks, codebook_size, codebook_dim))
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        init.normal_(self.codebooks)  # small rows would make p uniform and the gradient vanish

    def forward(self, latents: Tensor, entropy: bool = False) -> QuantizerOutput:
        with exact_float32(latents.device):
            chunks, table = self.split(latents), self._table()
            temperature = self.temperature if entropy else None
            codes, soft, entropy_loss = assign_by_softmax(
                chunks, table, table, temperature, self.entropy_eps, self.average_over_ranks
            )
            rows = look_up(codes, table)
            # value: the rows; gradient: to the chosen rows, and through `soft` to latents and all rows
            quantised = rows + (soft - soft.detach())
            vq = (
                self.through * F.mse_loss(quantised, chunks)
                + self.commitment * F.mse_loss(rows.detach(), chunks)
                + self.codebook * F.mse_loss(rows, chunks.detach())
            )
            losses = {"vq": vq, "entropy": entropy_loss}
            return QuantizerOutput(quantised.flatten(-2), codes, losses, self.track_usage(codes))

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        with exact_float32(latents.device):
            return search_by_product(self.split(latents), self._table())

    def embed(self, codes: Tensor) -> Tensor:
        return look_up(codes, self._table()).flatten(-2)

    def split(self, latents: Tensor) -> Tensor:
        chunks = latents.float().unflatten(-1, (len(self.code_sizes), -1))
        return F.normalize(chunks, dim=-1) if self.normalize else chunks

    def _table(self) -> Tensor:
        table = self.codebooks.float()
        return F.normalize(table, dim=-1) if self.normalize else table
