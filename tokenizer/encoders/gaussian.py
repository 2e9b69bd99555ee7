"""Learned anchors that become the 2D Gaussians of an image (GaussianToken, arXiv 2501.15619).

B batch, G Gaussians, D width of queries and of the inner encoder, (H, W) grid of its tokens, F feature
channels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from open_unitok.core.errors import UserError

from ..config import GEOMETRY, UniTokConfig
from ..entries import check_gaussian, inner_config, whole_options
from ..layers import Recomputing
from ..token_transformer import QueryLayer, query_heads

_NUMBERS = len(GEOMETRY)
_DEFAULTS = {"rounds": 3, "query_layers": 2}
GAUSSIAN_OPTIONS = (*_DEFAULTS, "query_heads")


class GaussianEncoder(Recomputing, nn.Module):
    """(B, 3, H, W) -> (B, G, F + 5): quantiser `gaussian`'s latents, features then raw geometry.

    Anchors are refined in rounds. In each, queries with the anchors' embedding read the tokens of an inner
    encoder by plain cross-attention (published: deformable attention at points around the Gaussian); the
    result replaces the anchor, but is added to its centre. Anchors are learned. Queries start from fixed
    random vectors, one per Gaussian: token g is always made by query g, and that is the order of the codes.

    `encoder_options`: encoder, the inner entry ("vqgan"); rounds (3); query_layers of each (2);
    query_heads (D / 64). All other options are the inner encoder's.

    Raises:
        UserError: an option is not valid; the layout has no `tokens`, or registers; the quantiser or the
            projection is another.
    """

    queries: Tensor

    def __init__(self, config: UniTokConfig, build_encoder: Callable[[UniTokConfig], Any]) -> None:
        super().__init__()
        check_gaussian(config, "encoder")
        options = config.encoder_options or {}
        sizes = whole_options("encoder", options, _DEFAULTS)
        self.inner: Any = build_encoder(inner_config(config, "encoder", GAUSSIAN_OPTIONS, "vqgan"))
        self.tokens, self.width = config.layout.tokens, config.codebook_dim
        self.patch_size, width = self.inner.patch_size, self.inner.width
        if width % 4:
            raise UserError(f"The inner encoder of 'gaussian' has width {width}: it must be a multiple of 4.")
        heads = query_heads(options, width, "encoder")
        self.anchors = nn.Parameter(torch.empty(self.tokens, _NUMBERS + width))
        self.register_buffer("queries", torch.empty(self.tokens, width))
        self.rounds = nn.ModuleList(
            Refinement(width, sizes["query_layers"], heads) for _ in range(sizes["rounds"])
        )
        self.head = FeatureHead(width, self.width - _NUMBERS)
        self.init_weights()

    def init_weights(self) -> None:
        # centres and scales are uniform, rotations in the middle; slots in the order in which they are read
        init.normal_(self.anchors)
        with torch.no_grad():
            unit = torch.rand(self.tokens, _NUMBERS, device=self.anchors.device).clamp(1e-4, 1 - 1e-4)
            raw = torch.logit(unit)
            raw[:, 2] = 0.0
            init.copy_(self.anchors[:, :_NUMBERS], raw)
        init.xavier_uniform_(self.queries)

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.inner(pixels)
        grid = pixels.shape[2] // self.patch_size, pixels.shape[3] // self.patch_size
        tokens = tokens + grid_positions(grid, tokens)
        # a copy: counting FLOPs without gradients fails on views of parameters
        anchors = self.anchors.to(tokens.dtype).repeat(len(pixels), 1, 1)
        queries = self.queries.to(tokens.dtype).expand(len(pixels), -1, -1)
        for refine in self.rounds:
            anchors, queries = self.call(refine, anchors, queries, tokens)
        raw, features = anchors.split([_NUMBERS, anchors.shape[-1] - _NUMBERS], dim=-1)
        return torch.cat([self.head(features), raw], dim=-1)


class Refinement(nn.Module):
    """One round: (B, G, 5 + D) anchors and (B, G, D) queries read (B, H*W, D) tokens -> the same two."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(
            nn.Linear(2 * width + _NUMBERS, width), nn.ReLU(), nn.Linear(width, width), nn.LayerNorm(width)
        )
        self.layers = nn.ModuleList(QueryLayer(width, heads) for _ in range(layers))
        self.update = FeatureHead(width, _NUMBERS + width)

    def forward(self, anchors: Tensor, queries: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        unit = anchors[..., :_NUMBERS].sigmoid()
        # the centre in the tokens' own position code, so that attention can look there
        place = positions(unit[..., :2], queries.shape[-1])
        queries = queries + self.embed(torch.cat([place, unit, anchors[..., _NUMBERS:]], dim=-1))
        for layer in self.layers:
            queries = layer(queries, tokens)
        found = self.update(queries)
        return torch.cat([anchors[..., :2] + found[..., :2], found[..., 2:]], dim=-1), queries


class FeatureHead(nn.Module):
    """Twice (linear, ReLU, linear, ReLU, LayerNorm), then linear times a learned factor per output."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()

        def half() -> list[nn.Module]:
            linear = nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
            return [*linear, nn.LayerNorm(width)]

        self.body = nn.Sequential(*half(), *half(), nn.Linear(width, outputs))
        self.factor = nn.Parameter(torch.ones(outputs))

    def init_weights(self) -> None:
        init.ones_(self.factor)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.body(hidden) * self.factor


def positions(unit: Tensor, width: int) -> Tensor:
    """(..., 2) places in [0, 1] -> (..., width): sine and cosine of both at width / 4 frequencies."""
    count = width // 4
    frequencies = torch.pi * 64 ** (torch.arange(count, device=unit.device) / max(count - 1, 1))
    angles = unit.float()[..., None] * frequencies  # (..., 2, count)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2).to(unit.dtype)


def grid_positions(grid: tuple[int, int], like: Tensor) -> Tensor:
    """(H*W, D) positions of the cells: column / W and row / H, where the splat has their pixels."""
    rows, columns = (torch.arange(count, device=like.device) / count for count in grid)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return positions(torch.stack([x, y], dim=-1).flatten(0, 1), like.shape[-1]).to(like.dtype)
