"""The depth head: the K codes of a visual token, autoregressively from one hidden state (arXiv 2502.20321,
section 3.4).

M visual tokens, K sub-codebooks, V entries per sub-codebook, D decoder width, W width of the head.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from .config import UniTokMLLMConfig


class DepthCache:
    """KV cache of the codes so far, and the RoPE tables of all K positions; inference only."""

    def __init__(self, rotary: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.rotary = rotary  # each (1, K, head width)
        self.layers = DynamicCache()


class DepthHead(nn.Module):
    """A few LLaMA layers over [hidden, E_0(c_0), ..., E_{K-2}(c_{K-2})]; output k gives the logits of code k.

    All sub-codebooks share one output layer. If W differs from D, a linear layer maps the hidden state first.
    Logits from a sub-codebook's size on are the lowest number of their dtype: they have no share in the loss
    and are never sampled.
    """

    def __init__(self, config: UniTokMLLMConfig, width: int) -> None:
        super().__init__()
        # A copy with its own attention implementation: the layers get no mask, and without a mask only sdpa
        # is causal.
        depth = copy.deepcopy(config.depth_config)
        depth._attn_implementation = "sdpa"
        self.num_codebooks, self.codebook_size = config.num_codebooks, config.codebook_size
        self.code_sizes = config.code_sizes  # None = all sub-codebooks have `codebook_size` entries
        own = depth.hidden_size
        self.reduce = nn.Linear(width, own, bias=False) if own != width else None
        # K-1 tables in one: the last code is never an input
        self.embeddings = nn.Embedding((config.num_codebooks - 1) * config.codebook_size, own)
        self.layers = nn.ModuleList(LlamaDecoderLayer(depth, i) for i in range(depth.num_hidden_layers))
        self.norm = LlamaRMSNorm(own, eps=depth.rms_norm_eps)
        self.output = nn.Linear(own, config.codebook_size)
        self.rotary = LlamaRotaryEmbedding(depth)

    def forward(self, hidden: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Teacher-forced: (M, D) hidden states and their (M, K) target codes -> (M, K, V) logits."""
        # table k starts at row k * V
        offsets = torch.arange(self.num_codebooks - 1, device=codes.device) * self.codebook_size
        # (M, K, W): position k holds code k - 1 and predicts code k
        state = torch.cat([self._enter(hidden), self.embeddings(codes[:, :-1] + offsets)], dim=1)
        rotary = self._rotary_tables(state)
        for layer in self.layers:
            state = layer(state, position_embeddings=rotary)
        logits = self.output(self.norm(state))
        if self.code_sizes is None:
            return logits
        return torch.stack([self.mask_logits(logits[:, k], k) for k in range(self.num_codebooks)], dim=1)

    def mask_logits(self, logits: torch.Tensor, k: int) -> torch.Tensor:
        """(..., V) logits of code k, the lowest number from the sub-codebook's size on."""
        size = self.codebook_size if self.code_sizes is None else self.code_sizes[k]
        if size == self.codebook_size:
            return logits
        # not -inf, of which guidance would make NaN; and no index tensor, which a CUDA graph cannot capture
        lowest = torch.finfo(logits.dtype).min
        return F.pad(logits[..., :size], (0, self.codebook_size - size), value=lowest)

    def step(self, k: int, entry: torch.Tensor, cache: DepthCache) -> torch.Tensor:
        """One decode step: logits (M, V) of code k.

        Args:
            k: 0 to K-1 in this order, with one cache from `new_cache`.
            entry: the hidden states (M, D) for k = 0, else the codes (M,) sampled at step k - 1.
        """
        if k == 0:
            state = self._enter(entry)
        else:  # table k - 1 starts at row (k - 1) * V
            state = self.embeddings(entry + (k - 1) * self.codebook_size).unsqueeze(1)
        cos, sin = cache.rotary
        position_embeddings = (cos[:, k : k + 1], sin[:, k : k + 1])
        for layer in self.layers:
            state = layer(
                state, position_embeddings=position_embeddings, past_key_values=cache.layers, use_cache=True
            )
        return self.mask_logits(self.output(self.norm(state))[:, 0], k)

    def new_cache(self) -> DepthCache:
        """An empty KV cache for the K steps of one visual token per row."""
        return DepthCache(self._rotary_tables(self.norm.weight))

    def _enter(self, hidden: torch.Tensor) -> torch.Tensor:
        """(M, D) -> (M, 1, W)."""
        return (hidden if self.reduce is None else self.reduce(hidden)).unsqueeze(1)

    def _rotary_tables(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        positions = torch.arange(self.num_codebooks, device=like.device)[None]
        return self.rotary(like, positions)
