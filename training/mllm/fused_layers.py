"""LLaMA layers for training on a CPU: the equations of transformers' modules in fewer operators.

On a CPU half of the time of a small decoder's step goes to operators between its matrix products: norms,
rotations, casts of autocast, a (rows, heads, L, L) mask. Here q, k and v are one product, and so are gate and
up; norm, rotation with attention, and gating have a backward pass of their own; attention runs in fp32 on
samples of about the same length, without a mask for padding. Results are those of the modules up to rounding.

T tokens of all samples, D width, F width of the MLP, H heads of width d; S samples of up to L tokens; R
rows (S, H, L) of all groups of samples.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

LENGTH_STEP = 16  # lengths are rounded up to a multiple of it: fewer groups, and more padding


class Layout(NamedTuple):
    """Where the tokens of samples are in the batched products of attention, and their rotation."""

    shapes: list[tuple[int, int]]  # (S * H, L) of each group
    take: torch.Tensor  # (3R,) of (T * 3H + 1) vectors, the last of which is zero, for padding
    back: torch.Tensor  # (T * 3H,) of (3R) rows
    take_mixed: torch.Tensor  # (R,) of (T * H + 1) vectors: one in place of q, k and v
    back_mixed: torch.Tensor  # (T * H,) of (R) rows
    turn: torch.Tensor  # (T, 2H * d / 2) complex
    heads: int


def supports_layers(layers: Iterable[nn.Module]) -> bool:
    """True for LLaMA layers as transformers has them: no grouped heads, biases, adapters, shards or hooks."""
    return all(_is_plain(layer) for layer in layers)


def fuse_layers(model: Any) -> bool:
    """Let an MLLM's decoder and depth head train by this module where it can; False if neither does."""
    decoder, head = model.language_model, model.depth_head
    model.fused_decoder = head.fused_layers = None
    plain = type(decoder) is LlamaModel and type(decoder.rotary_emb) is LlamaRotaryEmbedding
    if plain and supports_layers(decoder.layers):
        model.fused_decoder = functools.partial(run_decoder, decoder)
    if type(head.rotary) is LlamaRotaryEmbedding and supports_layers(head.layers):
        head.fused_layers = functools.partial(run_depth_head, list(head.layers), head.norm)
    return bool(model.fused_decoder or head.fused_layers)


def _is_plain(layer: Any) -> bool:
    if type(layer) is not LlamaDecoderLayer or layer._compiled_call_impl is not None:
        return False
    if layer.gradient_checkpointing:
        return False
    config, parts = layer.self_attn.config, list(layer.modules())
    return (
        layer.self_attn.num_key_value_groups == 1
        and not config.attention_dropout
        and config.hidden_act in ("silu", "swish")
        and not any(part._forward_hooks or part._forward_pre_hooks for part in parts)
        and all(type(part) is nn.Linear and part.bias is None for part in _projections(layer))
        and not any(hasattr(parameter, "ds_id") for parameter in layer.parameters())
    )


def _projections(layer: Any) -> list[Any]:
    attention, mlp = layer.self_attn, layer.mlp
    parts = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*parts, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def run_decoder(
    decoder: LlamaModel, vectors: torch.Tensor, positions: torch.Tensor, lengths: Sequence[int]
) -> BaseModelOutputWithPast:
    """(B, L, D) input vectors -> the last hidden states; `hidden_states` has those before the final norm.

    Args:
        positions: (B, L) or (1, L), of each token in its sample. lengths: of the samples, in order.
    """
    flat, positions = vectors.flatten(0, 1), positions.expand(vectors.shape[:2]).reshape(1, -1)
    cos, sin = decoder.rotary_emb(flat[None].float(), positions)
    layout = make_layout(group_samples(lengths), cos[0], sin[0], decoder.config.num_attention_heads)
    for layer in decoder.layers:
        flat = run_layer(layer, flat, layout)
    last = norm(decoder.norm, flat, flat.dtype)
    return BaseModelOutputWithPast(last.view_as(vectors), hidden_states=(flat.view_as(vectors),))  # pyright: ignore


def run_depth_head(
    layers: Sequence[Any], last_norm: LlamaRMSNorm, state: torch.Tensor, rotary: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """Layers and norm of a depth head; (M, K, W) -> (M, K, W), cosines and sines are (1, K, d)."""
    cos, sin = (table[0].repeat(len(state), 1) for table in rotary)
    samples = torch.arange(len(cos)).view(state.shape[:2])
    layout = make_layout([samples], cos, sin, layers[0].self_attn.config.num_attention_heads)
    flat = state.flatten(0, 1)
    for layer in layers:
        flat = run_layer(layer, flat, layout)
    return norm(last_norm, flat, flat.dtype).view_as(state)


def run_layer(layer: Any, hidden: torch.Tensor, layout: Layout) -> torch.Tensor:
    """One decoder layer: (T, D) -> (T, D)."""
    attention, mlp = layer.self_attn, layer.mlp
    dtype = hidden.dtype
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    # channels i and i + d/2, which turn together, become neighbours: complex numbers. q k^T stays the same
    order = _paired_channels(layout.heads, attention.head_dim)
    joint = [attention.q_proj.weight[order], attention.k_proj.weight[order], attention.v_proj.weight]
    qkv = F.linear(norm(layer.input_layernorm, hidden, dtype), torch.cat(joint).to(dtype))
    hidden = hidden + F.linear(_Attention.apply(qkv, layout), attention.o_proj.weight.to(dtype))
    joint = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).to(dtype)
    gated = _Gated.apply(F.linear(norm(layer.post_attention_layernorm, hidden, dtype), joint))
    return hidden + F.linear(gated, mlp.down_proj.weight.to(dtype))


@functools.lru_cache(maxsize=16)
def _paired_channels(heads: int, width: int) -> torch.Tensor:
    """(H * d,) channels: 0, d/2, 1, d/2 + 1, ... of each head."""
    return torch.arange(heads * width).view(heads, 2, width // 2).transpose(1, 2).flatten()


def group_samples(lengths: Sequence[int]) -> list[torch.Tensor]:
    """Samples of about the same length: tensors (S, L) of positions in the T tokens, T itself on padding."""
    total, start = sum(lengths), 0
    by_length: dict[int, list[torch.Tensor]] = {}
    for length in lengths:
        padded = -(-length // LENGTH_STEP) * LENGTH_STEP
        row = torch.full((padded,), total)
        row[:length] = torch.arange(start, start + length)
        by_length.setdefault(padded, []).append(row)
        start += length
    return [torch.stack(rows) for _, rows in sorted(by_length.items())]


def make_layout(groups: Sequence[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, heads: int) -> Layout:
    """The layout of `groups` of samples, as of `group_samples`; cosines and sines are (T, d)."""
    tokens, half = len(cos), cos.shape[1] // 2
    shapes = [(len(index) * heads, index.shape[1]) for index in groups]
    # token and head of each row (S, H, L)
    wide = [index[:, None].expand(-1, heads, -1) for index in groups]
    token = torch.cat([index.flatten() for index in wide])
    head = torch.cat([torch.arange(heads)[:, None].expand(index.shape).flatten() for index in wide])
    take, back = [], []
    for parts in (3, 1):
        vectors = parts * heads * tokens
        first = token * (parts * heads) + head
        places = torch.stack([first + part * heads for part in range(parts)])
        places = places.masked_fill_(token == tokens, vectors).flatten()
        found = torch.empty(vectors + 1, dtype=torch.int64)
        found[places] = torch.arange(len(places))
        take.append(places)
        back.append(found[:vectors])
    turn = torch.complex(cos[:, :half].float(), sin[:, :half].float()).repeat(1, 2 * heads)
    return Layout(shapes, take[0], back[0], take[1], back[1], turn, heads)


def norm(module: LlamaRMSNorm, hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """RMSNorm, computed in fp32, in `dtype`."""
    return _RMSNorm.apply(hidden, module.weight, module.variance_epsilon, dtype)  # pyright: ignore


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
    ) -> torch.Tensor:
        x = hidden.float()
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        return (x * scale).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:  # pyright: ignore
        hidden, weight, scale = ctx.saved_tensors
        # y = w n, n = x s, s = 1 / rms(x):  dx = s (w g - n mean(w g n))
        normed = hidden.float() * scale
        gradient = gradient.float()
        product = gradient * normed
        mean = (product @ weight.float()).div_(product.shape[-1]).unsqueeze(-1)
        found = (gradient * weight).addcmul_(normed, mean, value=-1).mul_(scale)
        return found.to(hidden.dtype), product.sum(0).to(weight.dtype), None, None


class _Gated(torch.autograd.Function):
    """(T, 2F) -> (T, F): silu(gate) * up."""

    @staticmethod
    def forward(ctx: Any, joint: torch.Tensor) -> torch.Tensor:
        gate, up = joint.chunk(2, dim=-1)
        active = F.silu(gate)
        ctx.save_for_backward(joint, active)
        return active * up

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # pyright: ignore
        joint, active = ctx.saved_tensors
        gate, up = joint.chunk(2, dim=-1)
        found = torch.empty_like(joint)
        of_gate, of_up = found.chunk(2, dim=-1)
        torch.mul(gradient, active, out=of_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
        return found


class _Attention(torch.autograd.Function):
    """(T, 3D) queries, keys and values -> (T, D): rotation, and causal attention within each sample."""

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def forward(ctx: Any, qkv: torch.Tensor, layout: Layout) -> torch.Tensor:
        width = qkv.shape[1] // (3 * layout.heads)
        vectors = qkv.new_empty(layout.back.shape[0] + 1, width, dtype=torch.float32)
        vectors[-1] = 0  # padding
        turned = vectors[:-1].view(qkv.shape)
        turned.copy_(qkv)
        _turn(turned, layout.turn)
        rows = vectors.index_select(0, layout.take).view(3, -1, width)
        result, saved = torch.empty_like(rows[:1]), []
        for (q, k, v), (out,) in zip(_split(rows, layout), _split(result, layout)):
            length = q.shape[1]
            mask = torch.full((length, length), -torch.inf).triu_(1)
            weights = torch.softmax(torch.baddbmm(mask, q, k.mT, alpha=width**-0.5), dim=-1)
            torch.bmm(weights, v, out=out)
            saved.append(weights)
        ctx.save_for_backward(rows, *saved)
        ctx.layout, ctx.dtype = layout, qkv.dtype
        return result[0].index_select(0, layout.back_mixed).to(qkv.dtype).view(len(qkv), -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:  # pyright: ignore
        rows, *saved = ctx.saved_tensors
        layout, width = ctx.layout, rows.shape[-1]
        vectors = gradient.new_empty(layout.back_mixed.shape[0] + 1, width, dtype=torch.float32)
        vectors[-1] = 0
        vectors[:-1] = gradient.reshape(-1, width)
        of_mixed = vectors.index_select(0, layout.take_mixed)[None]
        found = torch.empty_like(rows)
        inputs, outputs, mixed = (_split(x, layout) for x in (rows, found, of_mixed))
        for (q, k, v), (of_q, of_k, of_v), (g,), weights in zip(inputs, outputs, mixed, saved):
            of_scores = torch._softmax_backward_data(torch.bmm(g, v.mT), weights, -1, torch.float32)
            of_scores *= width**-0.5
            torch.bmm(of_scores, k, out=of_q)
            torch.bmm(of_scores.mT, q, out=of_k)
            torch.bmm(weights.mT, g, out=of_v)
        of_qkv = found.flatten(0, 1).index_select(0, layout.back).view(len(gradient), -1)
        _turn(of_qkv, layout.turn.conj())
        return of_qkv.to(ctx.dtype), None


def _turn(qkv: torch.Tensor, turn: torch.Tensor) -> None:
    """Rotate queries and keys of (T, 3D), in place."""
    pairs = qkv[:, : 2 * turn.shape[1]].unflatten(1, (-1, 2))
    torch.view_as_complex(pairs).mul_(turn)


def _split(rows: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
    """(parts, R, d) -> (parts, S * H, L, d) of each group: views."""
    pieces = rows.split([count * length for count, length in layout.shapes], dim=1)
    return [piece.unflatten(1, (count, length)) for piece, (count, length) in zip(pieces, layout.shapes)]
