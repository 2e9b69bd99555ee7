"""Quantisation by attention: latents are queries, codebook rows keys and values (CODA, arXiv 2503.17760).

B batch, N visual tokens, K codebooks, V entries per codebook, C width of one code, A width of queries and
keys, R = B*N rows.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

from open_unitok.core.errors import UserError, did_you_mean

from ..precision import exact_float32
from .base import Quantizer, QuantizerOutput, blocks_of_rows, search_codes

_NORMS = ("rms", "layer")
_EPS = 1e-5  # of the norms; the tokenizer's own have 1e-6


class AttentionQuantizer(Quantizer):
    """The entry of largest logit q.k / sqrt(A); what is decoded, and read by an MLLM, is its value W_v e.

    Published: K = 1, C = 16, A = 32. Several books share the three maps. The output is the value of the
    chosen entry; its gradient reaches queries and keys, and so all rows, through the softmax of the logits,
    and the chosen values.

    Losses, means over all numbers: "vq" = mse(output, latents), differentiated on both sides, + mse(values,
    latents) to the latents + codebook * mse(values, latents) to the values; "entropy": mean entropy of
    softmax(logits / temperature) minus entropy of its mean (published weight .05).

    Args:
        attention_dim: A; None = C.
        norm: of queries and keys: "rms", "layer" or None.
        codebook: weight of the last term of "vq"; the published code weighs this side, not the latents'.
        entropy_eps: added to the mean assignment before the logarithm.
    """

    row_norm = "none"
    codebooks: nn.Parameter

    def __init__(
        self,
        num_codebooks: int,
        codebook_size: int,
        codebook_dim: int,
        attention_dim: int | None = None,
        norm: str | None = "rms",
        codebook: float = 0.05,
        temperature: float = 0.01,
        entropy_eps: float = 1e-5,
    ) -> None:
        super().__init__([codebook_size] * num_codebooks, num_codebooks * codebook_dim)
        if norm is not None and norm not in _NORMS:
            raise UserError(f"quantizer_options.norm = {norm!r}." + did_you_mean(norm, _NORMS))
        width = codebook_dim if attention_dim is None else attention_dim
        if width < 1:
            raise UserError(f"quantizer_options.attention_dim = {width}: must be at least 1.")
        self.codebook, self.temperature, self.entropy_eps = codebook, temperature, entropy_eps
        self.codebooks = nn.Parameter(torch.empty(num_codebooks, codebook_size, codebook_dim))
        self.query, self.key = nn.Linear(codebook_dim, width), nn.Linear(codebook_dim, width)
        self.value = nn.Linear(codebook_dim, codebook_dim)
        self.query_norm, self.key_norm = _build_norm(norm, width), _build_norm(norm, width)
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        init.normal_(self.codebooks)

    def forward(self, latents: Tensor, entropy: bool = False) -> QuantizerOutput:
        with exact_float32(latents.device):
            chunks, keys, values = self.split(latents), self._keys(), self._values()
            codes, soft, entropy_loss = self._assign(chunks, keys, values.detach(), entropy)
            rows = _rows(codes, values)
            # value: the rows; gradient: to the chosen rows, and through the softmax to queries and keys
            quantised = rows + (soft - soft.detach())
            vq = (
                F.mse_loss(quantised, chunks)
                + F.mse_loss(rows.detach(), chunks)
                + self.codebook * F.mse_loss(rows, chunks.detach())
            )
            losses = {"vq": vq, "entropy": entropy_loss}
            return QuantizerOutput(quantised.flatten(-2), codes, losses, self.track_usage(codes))

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        with exact_float32(latents.device):
            keys = self._keys()
            return search_codes(
                self.queries(latents), keys.shape[1], lambda book, rows: (rows @ keys[book].T).argmax(dim=-1)
            )

    def embed(self, codes: Tensor) -> Tensor:
        with exact_float32(codes.device):
            return _rows(codes, self._values()).flatten(-2)

    def split(self, latents: Tensor) -> Tensor:
        return latents.float().unflatten(-1, (len(self.code_sizes), -1))

    def code_table(self) -> Tensor:
        """(K, V, C): the values, not the rows of `codebooks`, from which they are computed."""
        with torch.no_grad(), exact_float32(self.codebooks.device):
            return self._values()

    def queries(self, latents: Tensor) -> Tensor:
        """(B, N, K*C) -> (B, N, K, A), divided by sqrt(A): their products with the keys are the logits."""
        return self._queries(self.split(latents))

    def _queries(self, chunks: Tensor) -> Tensor:
        queries = self.query_norm(self.query(chunks))
        return queries / queries.shape[-1] ** 0.5

    def _keys(self) -> Tensor:
        """(K, V, A)."""
        return self.key_norm(self.key(self.codebooks.float()))

    def _values(self) -> Tensor:
        """(K, V, C)."""
        return self.value(self.codebooks.float())

    def _assign(
        self, chunks: Tensor, keys: Tensor, values: Tensor, entropy: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, K, C) -> codes (B, N, K), mean values under the softmax (B, N, K, C), and the entropy loss.

        Logits are computed block by block, and again in the backward pass: as a whole they would take B*N*K*V
        floats several times over.
        """
        batch, length, books, width = chunks.shape
        count, entries = batch * length, keys.shape[1]
        codes, soft, per_latent = [], [], chunks.new_zeros(())
        means = [chunks.new_zeros(entries) for _ in range(books)]  # mean assignment of each book
        temperature = self.temperature if entropy else None
        for book, queries in blocks_of_rows(self._queries(chunks), entries):
            found = _Block(
                *checkpoint(_attend, queries, keys[book], values[book], temperature, use_reentrant=False)
            )
            codes.append(found.codes)
            soft.append(found.mean_values)
            per_latent = per_latent + found.entropy / (count * books)
            means[book] = means[book] + found.assignment / count
        shape = (books, batch, length)
        ordered = torch.cat(codes).view(shape).permute(1, 2, 0).contiguous()
        mean_values = torch.cat(soft).view(*shape, width).permute(1, 2, 0, 3)
        if not entropy:
            return ordered, mean_values, chunks.new_zeros(())
        mean = torch.stack(means)
        if self.average_over_ranks is not None:  # entropy is not linear: average before the logarithm
            mean = self.average_over_ranks(mean)
        of_mean = -(mean * torch.log(mean + self.entropy_eps)).sum(dim=-1).mean()
        return ordered, mean_values, per_latent - of_mean


class _Block(NamedTuple):
    codes: Tensor  # (R,)
    mean_values: Tensor  # (R, C)
    entropy: Tensor  # scalar, summed over R
    assignment: Tensor  # (V,), summed over R


def _attend(queries: Tensor, keys: Tensor, values: Tensor, temperature: float | None) -> _Block:
    """(R, A), (V, A), (V, C) -> one block; the values are constant."""
    logits = queries @ keys.T
    codes = logits.argmax(dim=-1)
    soft = logits.softmax(dim=-1) @ values
    if temperature is None:
        return _Block(codes, soft, queries.new_zeros(()), queries.new_zeros(len(keys)))
    logs = torch.log_softmax(logits / temperature, dim=-1)
    probabilities = logs.exp()
    return _Block(codes, soft, -(probabilities * logs).sum(), probabilities.sum(dim=0))


def _rows(codes: Tensor, table: Tensor) -> Tensor:
    """(..., K) codes -> (..., K, C) rows of the (K, V, C) table."""
    offsets = torch.arange(len(table), device=table.device) * table.shape[1]
    return F.embedding(codes + offsets, table.flatten(0, 1))


def _build_norm(kind: str | None, width: int) -> nn.Module:
    if kind is None:
        return nn.Identity()
    return nn.RMSNorm(width, eps=_EPS) if kind == "rms" else nn.LayerNorm(width, eps=_EPS)
