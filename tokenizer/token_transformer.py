"""A plain transformer over a grid of tokens: the adapter of a book (FQGAN, arXiv 2411.16681, section 3.1) and
the heads that predict a teacher's features.

B batch, N tokens, D width.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .layers import Attention, Linear
from .token_layout import TokenLayout


class PreNormBlock(nn.Module):
    """Pre-norm transformer block with biases and an exact-GELU MLP of 4 times the width; (B, N, D) -> same.

    Blocks of other systems without a bias on the keys are equal: softmax cancels it.
    """

    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.up = Linear(width, 4 * width)
        self.down = Linear(4 * width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attention(self.norm1(hidden))
        return hidden + self.down(F.gelu(self.up(self.norm2(hidden))))


class TokenTransformer(nn.Module):
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
            hidden = block(hidden)
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
