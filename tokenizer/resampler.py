"""Query tokens that read a sequence: from L tokens to n, and back (SweetTok, arXiv 2412.10443, query
autoencoder).

B batch, L tokens read, n query tokens, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from open_unitok.core.errors import UserError

from .layers import Linear

EPS = 1e-6


class QueryLayer(nn.Module):
    """Cross-attention and MLP of query tokens, both with a residual: (B, n, D), (B, L, D) -> (B, n, D)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 2.0) -> None:
        super().__init__()
        self.heads = heads
        self.norm_q, self.norm_kv = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.q, self.kv, self.proj = Linear(width, width), Linear(width, 2 * width), Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width, eps=EPS)
        hidden = int(mlp_ratio * width)
        self.fc1, self.fc2 = Linear(width, hidden), Linear(hidden, width)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        key, value = self.kv(self.norm_kv(tokens)).chunk(2, dim=-1)
        query, key, value = (self._split(x) for x in (self.q(self.norm_q(queries)), key, value))
        mixed = F.scaled_dot_product_attention(query, key, value)  # (B, heads, n, D / heads)
        queries = queries + self.proj(mixed.transpose(1, 2).flatten(2))
        return queries + self.fc2(F.gelu(self.fc1(self.norm_mlp(queries))))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class QueryResampler(nn.Module):
    """(B, L, D) -> (B, n, D): learned queries read the tokens layer by layer.

    One with n = L leads back from n tokens to the grid. The tokens bring their own positions; the queries'
    are learned with them. Queries start as N(0, 1 / D).
    """

    def __init__(
        self, num_queries: int, width: int, depth: int = 1, heads: int = 8, mlp_ratio: float = 2.0
    ) -> None:
        super().__init__()
        for name, value in (("num_queries", num_queries), ("depth", depth)):
            if value < 1:
                raise UserError(f"{name} of a query resampler is {value}: it must be 1 or more.")
        if width % heads:
            raise UserError(f"{heads} heads of a query resampler do not divide its width {width}.")
        self.queries = nn.Parameter(torch.empty(num_queries, width))
        self.layers = nn.ModuleList(QueryLayer(width, heads, mlp_ratio) for _ in range(depth))
        self.init_weights()

    def init_weights(self) -> None:
        init.normal_(self.queries, std=self.queries.shape[1] ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        queries = self.queries.expand(len(tokens), -1, -1)
        for layer in self.layers:
            queries = layer(queries, tokens)
        return queries
