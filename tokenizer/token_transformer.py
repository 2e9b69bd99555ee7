"""Plain transformers over tokens: the adapter of a book (FQGAN, arXiv 2411.16681, section 3.1), the heads
that predict a teacher's features, and query tokens that read other tokens (SweetTok, arXiv 2412.10443, query
autoencoder).

B batch, N tokens, n query tokens, D width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from open_unitok.core.errors import UserError

from .layers import Attention, Linear, Recomputing
from .token_layout import TokenLayout

QUERY_EPS = 1e-6


class PreNormBlock(nn.Module):
    """Pre-norm transformer block with biases and an exact-GELU MLP of 4 times the width; (B, N, D) -> same.

    Blocks of other systems without a bias on the keys are equal: softmax cancels it.
    """

    def __init__(self, width: int, heads: int, eps: float, causal: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = Attention(width, heads, causal)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.up = Linear(width, 4 * width)
        self.down = Linear(4 * width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attention(self.norm1(hidden))
        return hidden + self.down(F.gelu(self.up(self.norm2(hidden))))


class TokenTransformer(Recomputing, nn.Module):
    """Learned positions, LayerNorm, blocks, LayerNorm, with full attention; (B, N, D) -> (B, N, D).

    With a class token the output has it in front, (B, 1 + N, D).

    Args:
        layout: of a training image; positions are interpolated for other grids.
        norm_first: the LayerNorm between positions and blocks.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        layout: TokenLayout,
        class_token: bool = False,
        norm_first: bool = True,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.class_token = nn.Parameter(torch.zeros(1, width)) if class_token else None
        self.positions = nn.Parameter(torch.zeros(layout.num_tokens + class_token, width))
        self.norm_pre = nn.LayerNorm(width, eps=eps) if norm_first else nn.Identity()
        self.blocks = nn.ModuleList(PreNormBlock(width, heads, eps) for _ in range(layers))
        self.norm_post = nn.LayerNorm(width, eps=eps)
        self.init_weights()

    def init_weights(self) -> None:
        init.trunc_normal_(self.positions, std=0.02)
        if self.class_token is not None:
            init.trunc_normal_(self.class_token, std=0.02)

    def forward(self, hidden: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """`grid` (rows, columns) of the image tokens; None = the layout's."""
        if self.class_token is not None:
            first = self.class_token.to(hidden.dtype).expand(len(hidden), 1, -1)
            hidden = torch.cat([first, hidden], dim=1)
        hidden = self.norm_pre(hidden + self._positions(grid or self.layout.grid).to(hidden.dtype))
        for block in self.blocks:
            hidden = self.call(block, hidden)
        return self.norm_post(hidden)

    def _positions(self, grid: tuple[int, int]) -> torch.Tensor:
        if grid == self.layout.grid:
            return self.positions
        count = self.layout.rows * self.layout.columns
        # class token and registers have no place in the grid
        first, places = self.positions[:-count], self.positions[-count:]
        square = places.T.unflatten(1, self.layout.grid)[None]
        resized = F.interpolate(square.float(), size=grid, mode="bicubic", align_corners=False)
        return torch.cat([first, resized[0].flatten(1).T.to(first.dtype)])


class SemanticDecoder(nn.Module):
    """Quantised latents to a teacher's patch features (VQ-KD: 1 layer; TokenFlow, arXiv 2412.03069: 3);
    (B, N, inputs) -> (B, N, outputs).

    A linear map, a transformer with a class token that is dropped, then linear, tanh, linear.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        layout: TokenLayout,
        width: int = 768,
        layers: int = 3,
        heads: int = 12,
    ) -> None:
        super().__init__()
        self.widen = Linear(inputs, width)
        self.transformer = TokenTransformer(
            width, layers, heads, layout, class_token=True, norm_first=False, eps=1e-6
        )
        self.first, self.second = Linear(width, width), Linear(width, outputs)

    def forward(self, quantised: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        hidden = self.transformer(self.widen(quantised), grid)[:, 1:]
        return self.second(torch.tanh(self.first(hidden)))


class ClassTokenHead(nn.Module):
    """Quantised latents of some books to a teacher's class token (FQGAN, arXiv 2411.16681, section 3.2);
    (B, N, inputs) -> (B, 1 + N, width), the prediction first.

    Linear, ReLU, linear, then a transformer of the teacher's width with a class token.
    """

    def __init__(self, inputs: int, width: int, layout: TokenLayout, layers: int = 3, heads: int = 8) -> None:
        super().__init__()
        self.first, self.second = Linear(inputs, width), Linear(width, width)
        self.transformer = TokenTransformer(width, layers, heads, layout, class_token=True)

    def forward(self, quantised: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        return self.transformer(self.second(F.relu(self.first(quantised))), grid)


class UnitLinear(Linear):
    """`Linear` that starts at unit gain.

    SweetTok's start, .02, is half of that at its width of 512. At smaller widths every query would read the
    mean of all tokens, and a small tokenizer show the mean image for hundreds of steps.
    """

    def init_weights(self) -> None:
        init.normal_(self.weight, std=self.in_features**-0.5)
        if self.bias is not None:
            init.zeros_(self.bias)


class QueryLayer(nn.Module):
    """Cross-attention and MLP of query tokens, both with a residual: (B, n, D), (B, N, D) -> (B, n, D)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 2.0) -> None:
        super().__init__()
        self.heads = heads
        self.norm_q, self.norm_kv = nn.LayerNorm(width, eps=QUERY_EPS), nn.LayerNorm(width, eps=QUERY_EPS)
        self.q, self.kv = UnitLinear(width, width), UnitLinear(width, 2 * width)
        self.proj = UnitLinear(width, width)
        self.norm_mlp = nn.LayerNorm(width, eps=QUERY_EPS)
        hidden = int(mlp_ratio * width)
        self.fc1, self.fc2 = UnitLinear(width, hidden), UnitLinear(hidden, width)

    def forward(self, queries: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        key, value = self.kv(self.norm_kv(tokens)).chunk(2, dim=-1)
        query, key, value = (self._split(x) for x in (self.q(self.norm_q(queries)), key, value))
        mixed = F.scaled_dot_product_attention(query, key, value)  # (B, heads, n, D / heads)
        queries = queries + self.proj(mixed.transpose(1, 2).flatten(2))
        return queries + self.fc2(F.gelu(self.fc1(self.norm_mlp(queries))))

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class QueryResampler(Recomputing, nn.Module):
    """(B, N, D) -> (B, n, D): learned queries read the tokens layer by layer.

    One with a query for each cell leads back from n tokens to the grid. The tokens bring their positions;
    the queries' are learned with them. Queries start as N(0, 1 / D).
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

    def forward(self, tokens: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        """Every layer reads the same tokens, or layer i those at i of a sequence of `depth` tensors."""
        read = [tokens] * len(self.layers) if isinstance(tokens, torch.Tensor) else tokens
        # a copy: counting FLOPs without gradients fails on views of parameters
        queries = self.queries.to(read[0].dtype).repeat(len(read[0]), 1, 1)
        for layer, layer_tokens in zip(self.layers, read, strict=True):
            queries = self.call(layer, queries, layer_tokens)
        return queries


def query_heads(options: Mapping[str, Any], width: int, field: str) -> int:
    """The option `query_heads` of an encoder or decoder with queries; by default heads of width 64.

    Raises:
        UserError: it does not divide the width.
    """
    heads = options.get("query_heads", max(width // 64, 1))
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1 or width % heads:
        raise UserError(f"{field}_options.query_heads is {heads!r}: it must divide the width {width}.")
    return heads
