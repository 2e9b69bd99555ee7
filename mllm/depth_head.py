"""The depth head: the K codes of a visual token, autoregressively from one hidden state (arXiv 2502.20321,
section 3.4).

M visual tokens, K sub-codebooks, V entries per sub-codebook, D decoder width, W width of the head.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from open_unitok.core.errors import UserError
from open_unitok.tokenizer.token_layout import TokenLayout

from .config import UniTokMLLMConfig


class DepthCache:
    """KV cache of the codes so far, and the RoPE tables of all K positions; inference only."""

    def __init__(self, rotary: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.rotary = rotary  # each (1, K, head width)
        self.layers = DynamicCache()


class DepthHead(nn.Module):
    """A few LLaMA layers over [hidden, E_0(c_0), ..., E_{K-2}(c_{K-2})]; output k gives the logits of code k.

    As published, all sub-codebooks share one output layer; `DepthOptions` has the variants. If W differs from
    D, a linear layer maps the hidden state first. Logits from a sub-codebook's size on are the lowest number
    of their dtype: they have no share in the loss and are never sampled.

    Args:
        tables: the input embedder's K tables in one, for `DepthOptions.tables` = "shared".
    """

    def __init__(self, config: UniTokMLLMConfig, width: int, tables: nn.Embedding | None = None) -> None:
        super().__init__()
        # A copy with its own attention implementation: the layers get no mask, and without a mask only sdpa
        # is causal.
        depth = copy.deepcopy(config.depth_config)
        depth._attn_implementation = "sdpa"
        options = self.options = config.depth
        self.num_codebooks, self.codebook_size = config.num_codebooks, config.codebook_size
        self.code_sizes = config.code_sizes  # None = all sub-codebooks have `codebook_size` entries
        own = depth.hidden_size
        self.reduce = nn.Linear(width, own, bias=False) if own != width else None
        if options.tables == "own":
            # K-1 tables in one: the last code is never an input
            self.embeddings = nn.Embedding((config.num_codebooks - 1) * config.codebook_size, own)
        # in a tuple, or the embedder's weights would be the head's too and be saved twice
        self._tables = (tables if options.tables == "shared" else None,)
        self.layers = nn.ModuleList(LlamaDecoderLayer(depth, i) for i in range(depth.num_hidden_layers))
        self.norm = LlamaRMSNorm(own, eps=depth.rms_norm_eps)
        layer, bias = ZeroLinear if options.zero_outputs else nn.Linear, options.output_bias
        if options.outputs == "shared":
            self.output = layer(own, config.codebook_size, bias=bias)
        else:
            self.outputs = nn.ModuleList(layer(own, size, bias=bias) for size in config.book_sizes)
        if options.rotary == "1d":
            self.rotary = LlamaRotaryEmbedding(depth)
        elif options.rotary == "grid":
            columns = TokenLayout.from_config(config.token_layout, config.num_image_tokens).columns
            self.rotary = GridRotation(depth.head_dim, columns, depth.rope_parameters["rope_theta"])
        else:
            self.rotary = NoRotation(depth.head_dim)

    def forward(
        self, hidden: torch.Tensor, codes: torch.Tensor, residual_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """Teacher-forced: (M, D) hidden states and their (M, K) target codes -> (M, K, V) logits.

        Args:
            residual_dtype: of the sums over layers under autocast; None = that of the weights.
        """
        # table k starts at row k * V
        offsets = torch.arange(self.num_codebooks - 1, device=codes.device) * self.codebook_size
        # (M, K, W): position k holds code k - 1 and predicts code k
        state = torch.cat([self._enter(hidden), self.embed_rows(codes[:, :-1] + offsets)], dim=1)
        if residual_dtype is not None:
            state = state.to(residual_dtype)
        rotary = self._rotary_tables(state)
        for layer in self.layers:
            state = layer(state, position_embeddings=rotary)
        state = self.norm(state)
        if self.options.outputs == "shared":
            logits = self.output(state)
            if self.code_sizes is None:
                return logits
            parts = logits.unbind(1)
        else:
            parts = [layer(state[:, k]) for k, layer in enumerate(self.outputs)]
        return torch.stack([self.mask_logits(part, k) for k, part in enumerate(parts)], dim=1)

    def output_layers(self) -> list[nn.Linear]:
        """The output layer of each of the K codes."""
        if self.options.outputs == "shared":
            return [self.output] * self.num_codebooks
        return list(self.outputs)  # pyright: ignore[reportReturnType]

    def embed_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the tables (code k of the k-th table is row k * V + code) -> vectors of width W."""
        tables = self.embeddings if self._tables[0] is None else self._tables[0]
        return tables(rows)

    def mask_logits(self, logits: torch.Tensor, k: int) -> torch.Tensor:
        """(..., V), or as many as there are, logits of code k -> (..., V), the lowest number from the
        sub-codebook's size on."""
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
            state = self.embed_rows(entry + (k - 1) * self.codebook_size).unsqueeze(1)
        cos, sin = cache.rotary
        position_embeddings = (cos[:, k : k + 1], sin[:, k : k + 1])
        for layer in self.layers:
            state = layer(
                state, position_embeddings=position_embeddings, past_key_values=cache.layers, use_cache=True
            )
        return self.mask_logits(self.output_layers()[k](self.norm(state))[:, 0], k)

    def new_cache(self) -> DepthCache:
        """An empty KV cache for the K steps of one visual token per row."""
        return DepthCache(self._rotary_tables(self.norm.weight))

    def _enter(self, hidden: torch.Tensor) -> torch.Tensor:
        """(M, D) -> (M, 1, W)."""
        return (hidden if self.reduce is None else self.reduce(hidden)).unsqueeze(1)

    def _rotary_tables(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        positions = torch.arange(self.num_codebooks, device=like.device)[None]
        return self.rotary(like, positions)


class ZeroLinear(nn.Linear):
    """A linear layer that starts from zero."""

    def init_weights(self) -> None:
        for parameter in self.parameters():
            init.zeros_(parameter)


class NoRotation(nn.Module):
    """Cosines 1 and sines 0: LLaMA layers without positions."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim

    def forward(self, like: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(1, n) positions -> cosines and sines (1, n, head width) in the dtype of `like`."""
        ones = like.new_ones(*positions.shape, self.head_dim)
        return ones, torch.zeros_like(ones)


class GridRotation(nn.Module):
    """FQGAN's rotation: position 0 becomes zero, position s > 0 turns by row and column of cell s - 1.

    The first half of the pairs of channels turns by the row, the rest by the column. A pair is (i, i + half),
    as in transformers; published weights have pairs (2i, 2i + 1) in the rows of queries and keys.

    Args:
        columns: of the image's grid.
    """

    def __init__(self, head_dim: int, columns: int, base: float) -> None:
        super().__init__()
        self.head_dim, self.columns, self.base = head_dim, columns, base

    def forward(self, like: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(1, n) positions -> cosines and sines (1, n, head width) in the dtype of `like`."""
        quarter = torch.arange(self.head_dim // 4, device=positions.device)
        exact = torch.promote_types(torch.float32, like.dtype)
        rates = self.base ** (-quarter.to(exact) * 4 / self.head_dim)
        cells = (positions - 1).clamp(min=0)[..., None]
        row, column = cells // self.columns, cells % self.columns
        angles = torch.cat([row * rates, column * rates] * 2, dim=-1)
        # multiplied by zero, not turned by 0: scores with the context are 0 whatever it holds
        turned = (positions > 0)[..., None]
        return (angles.cos() * turned).to(like.dtype), (angles.sin() * turned).to(like.dtype)


class ContextDecoder:
    """A decoder whose `last_hidden_state` is the state before its final norm: FQGAN's context.

    Raises:
        UserError: the decoder has no final `norm`.
    """

    def __init__(self, decoder: Any) -> None:
        self.decoder, self.config = decoder, decoder.config
        check_final_norm(decoder)

    def __call__(self, **inputs: Any) -> Any:
        with norm_inputs(self.decoder) as found:
            output = self.decoder(**inputs)
        output.last_hidden_state = found[-1]
        return output


@contextlib.contextmanager
def norm_inputs(decoder: Any) -> Iterator[list[torch.Tensor]]:
    """A list to which each pass of `decoder` appends the input (B, L, D) of its final norm."""
    found: list[torch.Tensor] = []
    handle = decoder.norm.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    try:
        yield found
    finally:
        handle.remove()


def check_final_norm(decoder: Any) -> None:
    """
    Raises:
        UserError: the decoder has no final `norm`.
    """
    if not isinstance(getattr(decoder, "norm", None), nn.Module):
        raise UserError(
            f"depth_options.context = 'raw' needs a decoder with a final `norm`, which a "
            f"{decoder.config.model_type!r} does not have: set it to 'normed'."
        )
