"""LlamaGen's transformer block, its 2D rotary embedding, and the head over the K codes of a visual token.

transformers' LLaMA layer has neither these dropouts nor this rotary layout. (arXiv 2406.06525, section 3.2)

B batch, S sequence, D width, d width of a head, M visual tokens, K sub-codebooks, V entries of each.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from .config import ClassConditionalConfig


@functools.lru_cache(maxsize=16)
def rotary_table(rows: int, columns: int, head_dim: int, base: float, device: torch.device) -> torch.Tensor:
    """(1 + rows * columns, d/2, 2) cosines and sines, float32: the class, then the cells in raster order.

    The first d/4 pairs of channels turn by the row, the others by the column. The entry of the class is zero,
    as published: it zeroes the class's query and key, so that every token attends to it with logit 0.
    """
    # under inference_mode the cached tensor could not take part in training later
    with torch.inference_mode(False), torch.no_grad():
        half = head_dim // 2
        frequencies = 1.0 / base ** (torch.arange(0, half, 2, device=device, dtype=torch.float32) / half)
        row, column = (torch.arange(n, device=device, dtype=torch.float32) for n in (rows, columns))
        shape = (rows, columns, len(frequencies))
        angles = torch.cat(
            [
                torch.outer(row, frequencies)[:, None].expand(shape),
                torch.outer(column, frequencies)[None].expand(shape),
            ],
            dim=-1,
        ).flatten(0, 1)
        table = torch.stack([angles.cos(), angles.sin()], dim=-1)
        return torch.cat([torch.zeros_like(table[:1]), table])


def rotate(states: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turn (B, heads, S, d) by the angles in (S, d/2, 2); a pair is two neighbouring channels (2i, 2i+1)."""
    even, odd = states.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.unbind(-1)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return turned.flatten(-2).type_as(states)


class LlamaGenAttention(nn.Module):
    """Causal self-attention with one matrix for queries, keys and values, without biases."""

    def __init__(self, config: ClassConditionalConfig, index: int) -> None:
        super().__init__()
        self.heads, self.index, self.dropout = config.num_attention_heads, index, config.attention_dropout
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, hidden: torch.Tensor, rotary: torch.Tensor | None, cache: Any, mask: torch.Tensor | None
    ) -> torch.Tensor:
        joint = self.qkv(hidden).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = joint  # (B, heads, S, d) each
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        if cache is not None:
            key, value = cache.update(key, value, self.index)
        # a single new token sees all cached ones; several are causal among themselves, on an empty cache
        causal = mask is None and query.shape[2] > 1
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal=causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, config: ClassConditionalConfig) -> None:
        super().__init__()
        width, middle = config.hidden_size, config.intermediate_size
        assert middle is not None
        self.gate = nn.Linear(width, middle, bias=False)
        self.up = nn.Linear(width, middle, bias=False)
        self.down = nn.Linear(middle, width, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(hidden)) * self.up(hidden))


class LlamaGenBlock(GradientCheckpointingLayer):
    """Pre-norm attention and SwiGLU; dropout, or drop path, on the output of both.

    Args:
        index: of the block in its stack, where the KV cache keeps its keys and values.
        drop_path: share of the samples whose branches are left out in training.
    """

    def __init__(self, config: ClassConditionalConfig, index: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.attention_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = LlamaGenAttention(config, index)
        self.mlp_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)
        self.drop_path = drop_path

    def forward(
        self,
        hidden: torch.Tensor,
        rotary: torch.Tensor | None = None,
        cache: Any = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, S, D) -> (B, S, D); `rotary` (S, d/2, 2), `mask` (B or 1, 1, S, cached) True where visible."""
        mixed = self.attention(self.attention_norm(hidden), rotary, cache, mask)
        hidden = hidden + self._drop(self.dropout(mixed))
        return hidden + self._drop(self.dropout(self.mlp(self.mlp_norm(hidden))))

    def _drop(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.training or not self.drop_path:
            return branch
        keep = 1 - self.drop_path
        kept = torch.empty_like(branch[:, :1, :1]).bernoulli_(keep)
        return branch * kept / keep  # the mean stays


class CodeHead(nn.Module):
    """The logits of the K codes of a visual token from its hidden state.

    K > 1: causal blocks without positions over [hidden, E_0(c_0), ..., E_{K-2}(c_{K-2})], then one output
    layer with bias for all sub-codebooks. K = 1: an output layer without bias, as LlamaGen. Logits from a
    sub-codebook's size on are the lowest number of their dtype: they are never sampled.
    """

    def __init__(self, config: ClassConditionalConfig) -> None:
        super().__init__()
        self.sizes, self.codebook_size = config.book_sizes, config.codebook_size
        width = config.hidden_size
        # the last code is never an input
        self.embeddings = nn.ModuleList(nn.Embedding(size, width) for size in self.sizes[:-1])
        self.layers = nn.ModuleList(LlamaGenBlock(config, i) for i in range(config.depth_layers or 0))
        alone = config.num_codebooks == 1
        self.norm = nn.Identity() if alone else LlamaRMSNorm(width, eps=config.rms_norm_eps)
        self.output = nn.Linear(width, config.codebook_size, bias=not alone)

    def forward(self, hidden: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Teacher-forced: (M, D) hidden states and their (M, K) codes -> (M, K, V) logits."""
        inputs = [table(codes[:, k]) for k, table in enumerate(self.embeddings)]
        state = torch.stack([hidden, *inputs], dim=1)
        for layer in self.layers:
            state = layer(state)
        logits = self.output(self.norm(state))
        if min(self.sizes) == self.codebook_size:
            return logits
        return torch.stack([self._mask(logits[:, k], k) for k in range(len(self.sizes))], dim=1)

    def step(self, k: int, entry: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """One decode step: logits (M, V) of code k.

        Args:
            k: 0 to K-1 in this order, with one cache from `new_cache`.
            entry: the hidden states (M, D) for k = 0, else the codes (M,) sampled at step k - 1.
        """
        state = (entry if k == 0 else self.embeddings[k - 1](entry)).unsqueeze(1)
        for layer in self.layers:
            state = layer(state, cache=cache)
        return self._mask(self.output(self.norm(state))[:, 0], k)

    def new_cache(self) -> DynamicCache:
        """An empty KV cache for the K steps of one visual token per row."""
        return DynamicCache()

    def _mask(self, logits: torch.Tensor, k: int) -> torch.Tensor:
        """(..., V) logits of code k, the lowest number from the sub-codebook's size on."""
        missing = self.codebook_size - self.sizes[k]
        if not missing:
            return logits
        # not -inf, of which guidance would make NaN
        return F.pad(logits[..., : self.sizes[k]], (0, missing), value=torch.finfo(logits.dtype).min)
