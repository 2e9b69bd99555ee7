"""Projections between token width and code width; the attention projection loses less than a linear map
(arXiv 2502.20321, section 3.3).

B batch, N tokens, `heads` heads of width d.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from open_unitok.core.errors import UserError

from . import cpu
from .config import UniTokConfig
from .layers import GeGLU, Linear, split_heads
from .token_layout import TokenLayout
from .token_transformer import TokenTransformer


class KVCache:
    """KV cache of a causal projection, for inference in chunks of one or more tokens.

    Memory for `max_length` tokens is allocated at the first append.
    """

    mask: torch.Tensor | None = None  # set by subclasses whose `append` returns unfilled positions as well

    def __init__(self, max_length: int) -> None:
        self.max_length, self.length = max_length, 0
        self._keys = self._values = torch.empty(0)

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (B, heads, n, d) keys and values; return all so far, (B, heads, length, d).

        Raises:
            ValueError: more than `max_length` tokens.
        """
        end = self.length + key.shape[2]
        if end > self.max_length:
            raise ValueError(f"The KV cache holds up to {self.max_length} tokens, got {end}.")
        if self.length == 0:
            shape = (*key.shape[:2], self.max_length, key.shape[3])
            self._keys, self._values = key.new_empty(shape), value.new_empty(shape)
        self._keys[:, :, self.length : end] = key
        self._values[:, :, self.length : end] = value
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]


class ProjectionAttention(nn.Module):
    """Self-attention that changes the width; (B, N, inputs) -> (B, N, outputs).

    The heads are averaged when the width shrinks and concatenated when it grows. Keys have no bias.
    """

    def __init__(self, inputs: int, outputs: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal, self.outputs = heads, causal, outputs
        self.average = inputs > outputs
        # Attention runs at the larger width, so that averaging the heads is the only reduction.
        inner = inputs if self.average else outputs
        self.qkv = Linear(inputs, 3 * inner, bias=False)
        self.query_bias = nn.Parameter(torch.zeros(inner))
        self.value_bias = nn.Parameter(torch.zeros(inner))
        self.out = Linear(outputs, outputs)

    def init_weights(self) -> None:
        init.zeros_(self.query_bias)
        init.zeros_(self.value_bias)

    def forward(self, hidden: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        # A key bias adds q.b to all scores of a query, which softmax cancels. A zero bias keeps q, k and v in
        # one matrix product.
        bias = torch.cat([self.query_bias, torch.zeros_like(self.query_bias), self.value_bias])
        plain = type(self.qkv) is Linear
        # an adapter or a quantised layer acts only when it is called
        joint = cpu.linear(hidden, self.qkv.weight, bias) if plain else self.qkv(hidden) + bias
        query, key, value = split_heads(joint, self.heads)
        if cache is not None:
            key, value = cache.append(key, value)
        mask = None if cache is None else cache.mask
        mixed = self._attend(query, key, value, mask)  # (B, heads, N, d)
        if not self.average:
            return self.out(mixed.transpose(1, 2).flatten(2))
        mixed = mixed.mean(dim=1)  # (B, N, d)
        if mixed.shape[-1] != self.outputs:  # `heads` is not inputs / outputs
            mixed = F.adaptive_avg_pool1d(mixed, self.outputs)
        return self.out(mixed)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        new, seen = query.shape[2], key.shape[2]  # tokens in this call; tokens so far, these included
        if mask is not None:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        # `is_causal` aligns the mask to the first key: right without a cache, wrong for a chunk after cached
        # tokens. A single new token may attend to all keys and needs no mask.
        if self.causal and new != seen and new > 1:
            mask = torch.ones(new, seen, dtype=torch.bool, device=query.device).tril(seen - new)
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return F.scaled_dot_product_attention(query, key, value, is_causal=self.causal and new == seen)


class AttentionProjection(nn.Module):
    """A linear map plus attention, then a GeGLU; (B, N, inputs) -> (B, N, outputs).

    Args:
        inputs, outputs: widths; `heads` divides the larger of the two.
        causal: a token attends only to itself and earlier ones; allows a `KVCache`.
    """

    def __init__(self, inputs: int, outputs: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        if max(inputs, outputs) % heads:
            raise UserError(
                f"{heads} heads do not divide the width {max(inputs, outputs)}: set projection_heads."
            )
        self.causal = causal
        self.attention_norm = nn.LayerNorm(inputs)
        self.attention = ProjectionAttention(inputs, outputs, heads, causal)
        self.linear_norm = nn.LayerNorm(inputs)
        self.linear = Linear(inputs, outputs)
        self.mlp_norm = nn.LayerNorm(outputs)
        self.mlp = GeGLU(outputs)

    def forward(self, hidden: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """With a `cache`, `hidden` continues the tokens of earlier calls; the result equals one call on all.

        Raises:
            ValueError: a cache is passed to a projection that is not causal.
        """
        if cache is not None and not self.causal:
            raise ValueError("A KV cache needs a causal projection (causal=True).")
        mixed = self.linear(self.linear_norm(hidden)) + self.attention(self.attention_norm(hidden), cache)
        return mixed + self.mlp(self.mlp_norm(mixed))


class LinearProjection(Linear):
    """A linear map with the attention projection's interface; (B, N, inputs) -> (B, N, outputs)."""

    def forward(self, hidden: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Tokens are independent: the cache is ignored."""
        return super().forward(hidden)


class TanhProjection(nn.Module):
    """Linear, tanh, linear on each token, as in VQ-KD and TokenFlow; (B, N, inputs) -> (B, N, outputs)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        middle = max(inputs, outputs)
        self.first, self.second = Linear(inputs, middle), Linear(middle, outputs)

    def forward(self, hidden: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        return self.second(torch.tanh(self.first(hidden)))


class BookProjections(nn.Module):
    """A head for each book, as in FQGAN (arXiv 2411.16681, section 3.1): a transformer adapter, then a
    projection to the book's share of the latents; (B, N, inputs) -> (B, N, outputs).

    Args:
        outputs: width of the latents of all books.
        heads: see `build_projection`; adapter_layers, adapter_heads: sizes of each adapter.
        layout: of the tokens of a training image.
    """

    def __init__(
        self,
        kind: str,
        inputs: int,
        outputs: int,
        heads: int | None,
        books: int,
        adapter_layers: int,
        adapter_heads: int,
        layout: TokenLayout,
    ) -> None:
        super().__init__()
        if outputs % books:
            raise UserError(
                f"adapter_layers = {adapter_layers}: latents of width {outputs} do not divide into "
                f"{books} books, set it to 0."
            )
        if inputs % adapter_heads:
            raise UserError(
                f"adapter_heads = {adapter_heads} does not divide the encoder's width {inputs}: choose a "
                "divisor."
            )
        share = outputs // books
        heads = heads or max(inputs // share, 1)
        self.adapters = nn.ModuleList(
            TokenTransformer(inputs, adapter_layers, adapter_heads, layout) for _ in range(books)
        )
        self.projections = nn.ModuleList(build_projection(kind, inputs, share, heads) for _ in range(books))

    def forward(self, hidden: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """`grid` (rows, columns) of the image tokens; None = the layout's."""
        heads = zip(self.adapters, self.projections)
        return torch.cat([projection(adapter(hidden, grid)) for adapter, projection in heads], dim=-1)


class BlockProjections(nn.Module):
    """A projection for each of several encoders to its own block of every book's latents; (B, N, sum of
    inputs) -> (B, N, K*C).

    Args:
        kinds: of `build_projection`, inputs: width, and blocks: width in a book, of each encoder.
        books: K.
        heads: see `build_projection`; None = the larger width divided by the smaller.
    """

    def __init__(
        self,
        kinds: Sequence[str],
        inputs: Sequence[int],
        blocks: Sequence[int],
        books: int,
        heads: int | None,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.inputs, self.books = list(inputs), books
        self.projections = nn.ModuleList(
            build_projection(kind, width, books * block, heads or max(width // (books * block), 1), causal)
            for kind, width, block in zip(kinds, inputs, blocks, strict=True)
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        shares = hidden.split(self.inputs, dim=-1)
        found = [projection(share) for projection, share in zip(self.projections, shares)]
        # (B, N, K, block) of each encoder, side by side within a book
        return torch.cat([share.unflatten(-1, (self.books, -1)) for share in found], dim=-1).flatten(-2)


def build_projection(kind: str, inputs: int, outputs: int, heads: int, causal: bool = False) -> nn.Module:
    """Build a projection; `kind` is "attention", "linear", "tanh" or "none".

    Raises:
        UserError: "none" between different widths.
    """
    if kind == "none":
        if inputs != outputs:
            raise UserError(
                f"projection = 'none' needs equal widths, but tokens have {inputs} and latents {outputs}: "
                "set codebook_dim (times num_codebooks) to the width of the tokens, or another projection."
            )
        return nn.Identity()
    if kind == "linear":
        return LinearProjection(inputs, outputs)
    if kind == "tanh":
        return TanhProjection(inputs, outputs)
    return AttentionProjection(inputs, outputs, heads, causal)


def build_down_projection(config: UniTokConfig, encoder: Any, quantizer: Any) -> nn.Module:
    """The projection of an encoder's tokens to a quantiser's latents.

    Raises:
        UserError: the encoder has other blocks of latents than the quantiser.
    """
    latent, books, causal = quantizer.latent_dim, len(quantizer.code_sizes), config.projection_causal
    if hasattr(encoder, "widths"):  # several encoders
        return _build_block_projections(config, encoder, quantizer)
    if not config.adapter_layers:
        heads = config.projection_heads_for(encoder.width)
        return build_projection(config.projection, encoder.width, latent, heads, causal)
    return BookProjections(
        config.projection,
        encoder.width,
        latent,
        config.projection_heads,
        books,
        config.adapter_layers,
        config.adapter_heads,
        config.layout,
    )


def _build_block_projections(config: UniTokConfig, encoder: Any, quantizer: Any) -> nn.Module:
    widths, blocks = encoder.widths, quantizer.row_blocks
    if not isinstance(blocks, list) or len(blocks) != len(widths):
        raise UserError(
            f"encoder {config.encoder!r} makes {len(widths)} blocks of latents, quantizer "
            f"{config.quantizer!r} has {blocks}: take 'shared_index' with {len(widths)} block_widths."
        )
    if config.adapter_layers:
        raise UserError(
            f"adapter_layers = {config.adapter_layers}: the blocks of encoder {config.encoder!r} have no "
            "adapters, set it to 0."
        )
    kinds = [kind or config.projection for kind in encoder.projections]
    books, causal = len(quantizer.code_sizes), config.projection_causal
    return BlockProjections(kinds, widths, blocks, books, config.projection_heads, causal)
