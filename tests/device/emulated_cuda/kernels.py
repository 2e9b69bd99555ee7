"""CUDA kernels without a CPU counterpart: torch's variable-length FlashAttention, in fp32 inside.

T tokens of all samples, H heads of queries, h of keys and values, d width of a head.
"""

from typing import Any

import torch
from torch import Tensor


def varlen_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts_q: Tensor,
    starts_k: Tensor | None,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: Any = None,
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch_attn::_varlen_attn` on CPU tensors: output (T, H, d), log-sum-exp (H, T), random state."""
    if seqused_k is not None or block_table is not None or starts_k is None:
        raise NotImplementedError("the emulated device has no paged variable-length attention")
    _check(query, key, value, starts_q, starts_k, max_q, max_k)
    out, lse = torch.empty_like(query), query.new_empty(query.shape[1], len(query), dtype=torch.float32)
    for tokens, others in _samples(starts_q, starts_k):
        scores = _scores(query[tokens], key[others], scale, window_size)
        lse[:, tokens] = scores.logsumexp(-1)
        weights = scores.softmax(-1).nan_to_num(0.0)
        out[tokens] = torch.einsum("hqk,khd->qhd", weights, _repeat(value[others], query)).to(out.dtype)
    return out, lse, torch.zeros(2, dtype=torch.uint64)


def varlen_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    rng_state: Tensor,
    scale: float | None = None,
    window_size: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch_attn::_varlen_attn_backward` on CPU tensors: gradients of queries, keys and values."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    grads = tuple(torch.zeros_like(x) for x in (query, key, value))
    for tokens, others in _samples(starts_q, starts_k):
        q, k, v = query[tokens].float(), _repeat(key[others], query), _repeat(value[others], query)
        weights = _scores(query[tokens], key[others], scale, window_size).softmax(-1).nan_to_num(0.0)
        upper = grad_out[tokens].float()
        d_weights = torch.einsum("qhd,khd->hqk", upper, v)
        # dS = P (dP - rowsum(dO O)), the softmax's gradient
        d_scores = weights * (d_weights - (upper * out[tokens].float()).sum(-1).T[..., None]) * factor
        found = (
            torch.einsum("hqk,khd->qhd", d_scores, k),
            torch.einsum("hqk,qhd->khd", d_scores, q),
            torch.einsum("hqk,qhd->khd", weights, upper),
        )
        for grad, part, rows in zip(grads, found, (tokens, others, others)):
            grad[rows] = part.unflatten(1, (grad.shape[1], -1)).sum(2).to(grad.dtype)  # over shared heads
    return grads


KERNELS = {
    "torch_attn::_varlen_attn": varlen_forward,
    "torch_attn::_varlen_attn_backward": varlen_backward,
}


def _check(
    query: Tensor, key: Tensor, value: Tensor, starts_q: Tensor, starts_k: Tensor, max_q: int, max_k: int
) -> None:
    """
    Raises:
        RuntimeError: what the kernel refuses, or would read beyond its input for.
    """
    if {query.dtype, key.dtype, value.dtype} not in ({torch.bfloat16}, {torch.float16}):
        raise RuntimeError(f"FlashAttention only support fp16 and bf16 data type, got {query.dtype}")
    if query.shape[-1] % 8 or query.shape[-1] > 256:
        raise RuntimeError(f"head_size should be a multiple of 8, at most 256; got {query.shape[-1]}")
    for name, starts, tokens, longest in (("q", starts_q, query, max_q), ("k", starts_k, key, max_k)):
        if starts.dtype != torch.int32 or not starts.is_contiguous():
            raise RuntimeError(f"cu_seqlens_{name} must be contiguous and have dtype int32")
        lengths = starts.diff()
        if starts[0] != 0 or starts[-1] != len(tokens) or lengths.max() > longest or lengths.min() < 0:
            raise RuntimeError(f"cu_seqlens_{name} {starts.tolist()} of {len(tokens)} tokens, max {longest}")


def _samples(starts_q: Tensor, starts_k: Tensor) -> list[tuple[slice, slice]]:
    bounds = [list(zip(x.tolist(), x.tolist()[1:])) for x in (starts_q, starts_k)]
    return [(slice(*one), slice(*other)) for one, other in zip(*bounds)]


def _repeat(shared: Tensor, query: Tensor) -> Tensor:
    """(T, h, d) -> (T, H, d) in fp32."""
    return shared.float().repeat_interleave(query.shape[1] // shared.shape[1], 1)


def _scores(query: Tensor, key: Tensor, scale: float | None, window: Any) -> Tensor:
    """(H, queries, keys); -inf outside the window (tokens before, tokens after), aligned at the end."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("qhd,khd->hqk", query.float() * factor, _repeat(key, query))
    before, after = window if window is not None else (-1, -1)
    count_q, count_k = scores.shape[1:]
    position = torch.arange(count_q)[:, None] + count_k - count_q
    distance = torch.arange(count_k)[None] - position
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    hidden |= (distance > after) if after >= 0 else False
    hidden |= (distance < -before) if before >= 0 else False
    return scores.masked_fill(hidden, -torch.inf)
