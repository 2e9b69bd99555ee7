"""Index backpropagation quantisation (IBQ, arXiv 2412.02692): the decoder's gradient reaches every row
through the softmax over all similarities.

B batch, N visual tokens, K codebooks, V entries per codebook, C width of one code, R = B*N rows.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

from ..precision import exact_float32
from .base import Quantizer, QuantizerOutput, blocks_of_rows, search_codes


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
            codes, soft, entropy_loss = self._assign(chunks, table, entropy)
            rows = self._rows(codes, table)
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
            chunks, table = self.split(latents), self._table()
            return search_codes(
                chunks, table.shape[1], lambda book, rows: (rows @ table[book].T).argmax(dim=-1)
            )

    def embed(self, codes: Tensor) -> Tensor:
        return self._rows(codes, self._table()).flatten(-2)

    def split(self, latents: Tensor) -> Tensor:
        chunks = latents.float().unflatten(-1, (len(self.code_sizes), -1))
        return F.normalize(chunks, dim=-1) if self.normalize else chunks

    def _table(self) -> Tensor:
        table = self.codebooks.float()
        return F.normalize(table, dim=-1) if self.normalize else table

    def _rows(self, codes: Tensor, table: Tensor) -> Tensor:
        """(..., K) -> (..., K, C)."""
        offsets = torch.arange(len(table), device=table.device) * table.shape[1]
        return F.embedding(codes + offsets, table.flatten(0, 1))

    def _assign(self, chunks: Tensor, table: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, K, C) -> codes (B, N, K), the mean rows under p (B, N, K, C), and the entropy loss.

        Similarities are computed block by block, and again in the backward pass: as a whole they would take
        B*N*K*V floats several times over.
        """
        batch, length, books, width = chunks.shape
        count, entries = batch * length, table.shape[1]
        codes, soft, per_latent = [], [], chunks.new_zeros(())
        means = [chunks.new_zeros(entries) for _ in range(books)]  # mean assignment of each book
        temperature = self.temperature if entropy else None
        for book, rows in blocks_of_rows(chunks, entries):
            found = checkpoint(_assign_block, rows, table[book], temperature, use_reentrant=False)
            codes.append(found[0])
            soft.append(found[1])
            per_latent = per_latent + found[2] / (count * books)
            means[book] = means[book] + found[3] / count
        shape = (books, batch, length)
        ordered = torch.cat(codes).view(shape).permute(1, 2, 0).contiguous()
        mean_rows = torch.cat(soft).view(*shape, width).permute(1, 2, 0, 3)
        if not entropy:
            return ordered, mean_rows, chunks.new_zeros(())
        mean = torch.stack(means)
        if self.average_over_ranks is not None:  # entropy is not linear: average before the logarithm
            mean = self.average_over_ranks(mean)
        of_mean = -(mean * torch.log(mean + self.entropy_eps)).sum(dim=-1).mean()
        return ordered, mean_rows, per_latent - of_mean


def _assign_block(
    rows: Tensor, table: Tensor, temperature: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(R, C), (V, C) -> codes (R,), mean rows (R, C), the summed entropy, summed assignments (V,)."""
    similarity = rows @ table.T
    codes = similarity.argmax(dim=-1)
    # the rows of the product are constant: their gradient goes through the similarities alone
    soft = similarity.softmax(dim=-1) @ table.detach()
    if temperature is None:
        return codes, soft, rows.new_zeros(()), rows.new_zeros(len(table))
    logs = torch.log_softmax(similarity / temperature, dim=-1)
    probabilities = logs.exp()
    return codes, soft, -(probabilities * logs).sum(), probabilities.sum(dim=0)
