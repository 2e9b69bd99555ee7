"""The parts of a `VideoTokenizer`: patches of a clip, the paths of appearance and of motion, their mirror
(SweetTok, arXiv 2412.10443, decoupled query autoencoder).

B batch, S steps in time (the first frame, then tubes), P patches of a frame in raster order, n spatial query
tokens, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..layers import NORM_EPS, Linear
from ..token_transformer import PreNormBlock, QueryLayer, QueryResampler
from .config import VideoTokenizerConfig


class ClipPatches(nn.Module):
    """(B, 3, T, H, W) pixels -> (B, S, P, D) embeddings of the patches, and (B, S - 1, P, D) their changes
    from step to step."""

    def __init__(self, config: VideoTokenizerConfig) -> None:
        super().__init__()
        self.patch_size, self.tube_frames = config.patch_size, config.tube_frames
        size = 3 * config.patch_size**2
        self.tube = Linear(size * config.tube_frames, config.hidden_size)
        self.first = Linear(size, config.hidden_size) if config.first_frame == "own" else None

    def forward(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        tubes = self.tubes(clip)
        if self.first is None:
            # the map is linear: changes of the pixels are embedded, and none gives exactly 0
            return self.tube(tubes), F.linear(tubes[:, 1:] - tubes[:, :-1], self.tube.weight)
        frame = tubes[:, :1].unflatten(-1, (3, self.tube_frames, -1))[..., 0, :].flatten(-2)
        tokens = torch.cat([self.first(frame), self.tube(tubes[:, 1:])], dim=1)
        return tokens, tokens[:, 1:] - tokens[:, :-1]

    def tubes(self, clip: Tensor) -> Tensor:
        """(B, S, P, 3 * tube_frames * patch_size**2) pixels; the first frame fills all frames of its tube."""
        frames = torch.cat([clip[:, :, :1].expand(-1, -1, self.tube_frames, -1, -1), clip[:, :, 1:]], dim=2)
        p = self.patch_size
        # (B, 3, S, t, rows, p, columns, p) -> (B, S, rows, columns, 3, t, p, p)
        split = frames.unflatten(4, (-1, p)).unflatten(3, (-1, p)).unflatten(2, (-1, self.tube_frames))
        return split.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(2, 3)


class SpatialPath(nn.Module):
    """(B, S, P, D) embeddings -> (B, n, D) tokens of appearance: a transformer for each frame; layer i of the
    queries reads its layer i, over all frames or of the first."""

    def __init__(self, config: VideoTokenizerConfig) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.side, self.windowed = config.side, set(config.windowed_layers)
        self.window, self.input = config.window_size, config.spatial_input
        self.positions = nn.Parameter(torch.zeros(config.side**2, width))
        self.blocks = nn.ModuleList(
            PreNormBlock(width, heads, NORM_EPS) for _ in range(config.spatial_layers)
        )
        self.queries = QueryResampler(config.spatial_queries, width, config.spatial_layers, heads)

    def init_weights(self) -> None:
        init.trunc_normal_(self.positions, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.input == "first":
            tokens = tokens[:, :1]
        batch, steps = tokens.shape[:2]
        hidden = (tokens + self.positions).flatten(0, 1)
        read = []
        for layer, block in enumerate(self.blocks):
            hidden = self._within_windows(block, hidden) if layer in self.windowed else block(hidden)
            read.append(hidden.unflatten(0, (batch, steps)).mean(dim=1))
        return self.queries(read)

    def _within_windows(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block on each window of (B, P, D) tokens alone."""
        w, count = self.window, self.side // self.window
        # (B, rows of windows, w, columns of windows, w, D) -> (B * windows, w * w, D), and back
        windows = hidden.unflatten(1, (count, w, count, w)).transpose(2, 3).flatten(3, 4).flatten(0, 2)
        found = block(windows).unflatten(0, (-1, count, count)).unflatten(3, (w, w))
        return found.transpose(2, 3).flatten(1, 4)


class TemporalPath(nn.Module):
    """(B, S - 1, P, D) changes -> (B, P, D) tokens of motion: a causal transformer over time for each
    place; layer i of the place's query reads its layer i."""

    def __init__(self, config: VideoTokenizerConfig) -> None:
        super().__init__()
        width, heads, layers = config.hidden_size, config.num_attention_heads, config.temporal_layers
        self.positions = nn.Parameter(torch.zeros(config.steps - 1, width))
        self.blocks = nn.ModuleList(PreNormBlock(width, heads, NORM_EPS, causal=True) for _ in range(layers))
        # one query of each place alone, where a `QueryResampler` reads all places
        self.queries = nn.Parameter(torch.zeros(config.side**2, width))
        self.layers = nn.ModuleList(QueryLayer(width, heads) for _ in range(layers))

    def init_weights(self) -> None:
        init.trunc_normal_(self.positions, std=0.02)
        init.normal_(self.queries, std=self.queries.shape[1] ** -0.5)

    def forward(self, changes: Tensor) -> Tensor:
        batch = len(changes)
        hidden = changes.transpose(1, 2).flatten(0, 1) + self.positions  # (B * P, S - 1, D)
        queries = self.queries.repeat(batch, 1)[:, None]
        for block, layer in zip(self.blocks, self.layers):
            hidden = block(hidden)
            queries = layer(queries, hidden)
        return queries.unflatten(0, (batch, -1)).squeeze(2)


class ClipDecoder(nn.Module):
    """(B, n, D) tokens of appearance, (B, P, D) of motion -> (B, S, P, D): mask tokens of every place and
    step read the former; in between, every place reads its token of motion and its own earlier steps."""

    def __init__(self, config: VideoTokenizerConfig) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.shape = (config.steps, config.side**2)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.places = nn.Parameter(torch.zeros(config.side**2, width))
        self.times = nn.Parameter(torch.zeros(config.steps, width))
        # attention has no order: the position tells which of the n tokens one is
        self.token_positions = nn.Parameter(torch.zeros(config.spatial_queries, width))
        self.layers = nn.ModuleList(QueryLayer(width, heads) for _ in range(config.spatial_layers))
        self.temporal = nn.ModuleDict(
            {str(layer): PreNormBlock(width, heads, NORM_EPS, causal=True) for layer in config.temporal_after}
        )
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def init_weights(self) -> None:
        init.normal_(self.mask_token, std=len(self.mask_token) ** -0.5)
        for positions in (self.places, self.times, self.token_positions):
            init.trunc_normal_(positions, std=0.02)

    def forward(self, appearance: Tensor, motion: Tensor) -> Tensor:
        batch = len(appearance)
        appearance = appearance + self.token_positions
        masks = (self.mask_token + self.places + self.times[:, None]).flatten(0, 1)
        hidden = masks.repeat(batch, 1, 1)  # (B, S * P, D)
        for number, layer in enumerate(self.layers, 1):
            hidden = layer(hidden, appearance)
            if str(number) in self.temporal:
                hidden = self._over_time(self.temporal[str(number)], hidden, motion)
        return self.norm(hidden).unflatten(1, self.shape)

    def _over_time(self, block: nn.Module, hidden: Tensor, motion: Tensor) -> Tensor:
        """The causal block on each place's steps, its token of motion before them."""
        batch = len(hidden)
        steps = hidden.unflatten(1, self.shape).transpose(1, 2).flatten(0, 1)  # (B * P, S, D)
        found = block(torch.cat([motion.flatten(0, 1)[:, None], steps], dim=1))[:, 1:]
        return found.unflatten(0, (batch, -1)).transpose(1, 2).flatten(1, 2)


class PixelHead(nn.Module):
    """(B, S, P, D) -> (B, 3, T, H, W): a transformer for each frame or tube, then one linear map a patch."""

    def __init__(self, config: VideoTokenizerConfig) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.patch_size, self.tube_frames, self.side = config.patch_size, config.tube_frames, config.side
        self.positions = nn.Parameter(torch.zeros(config.side**2, width))
        self.blocks = nn.ModuleList(PreNormBlock(width, heads, NORM_EPS) for _ in range(config.pixel_layers))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        size = 3 * config.patch_size**2
        self.first, self.tube = Linear(width, size), Linear(width, size * config.tube_frames)

    def init_weights(self) -> None:
        init.trunc_normal_(self.positions, std=0.02)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, steps = hidden.shape[:2]
        hidden = (hidden + self.positions).flatten(0, 1)
        for block in self.blocks:
            hidden = block(hidden)
        hidden = self.norm(hidden).unflatten(0, (batch, steps))
        first = self._frames(self.first(hidden[:, :1]), 1)
        return torch.cat([first, self._frames(self.tube(hidden[:, 1:]), self.tube_frames)], dim=2)

    def _frames(self, patches: Tensor, frames: int) -> Tensor:
        """(B, s, P, 3 * frames * p * p) -> (B, 3, s * frames, H, W)."""
        p = self.patch_size
        split = patches.unflatten(2, (self.side, self.side)).unflatten(-1, (3, frames, p, p))
        # (B, s, rows, columns, 3, t, p, p) -> (B, 3, s, t, rows, p, columns, p)
        return split.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6).flatten(4, 5).flatten(2, 3)
