"""Quantisation by attention: latents are queries, codebook rows keys and values (CODA, arXiv 2503.17760).

B batch, N visual tokens, K codebooks, V entries per codebook, C width of one code, A width of queries and
keys, R = B*N rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from open_unitok.core.errors import UserError, did_you_mean

from ..precision import exact_float32
from .base import Quantizer, QuantizerOutput, look_up, search_by_product
from .softmax_assignment import assign_by_softmax

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
            temperature = self.temperature if entropy else None
            codes, soft, entropy_loss = assign_by_softmax(
                self._queries(chunks), keys, values, temperature, self.entropy_eps, self.average_over_ranks
            )
            rows = look_up(codes, values)
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
            return search_by_product(self.queries(latents), self._keys())

    def embed(self, codes: Tensor) -> Tensor:
        with exact_float32(codes.device):
            return look_up(codes, self._values()).flatten(-2)

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


def _build_norm(kind: str | None, width: int) -> nn.Module:
    if kind is None:
        return nn.Identity()
    return nn.RMSNorm(width, eps=_EPS) if kind == "rms" else nn.LayerNorm(width, eps=_EPS)
