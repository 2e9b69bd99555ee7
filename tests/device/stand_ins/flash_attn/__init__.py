"""A stand-in for the package flash-attn 2 with its interface and its refusals, for tests without its kernels.

Written in torch's operators with fp32 inside, differentiable. B rows, L tokens per row, T tokens of all
samples, H heads of queries, h of keys and values, d width of a head.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

__version__ = "2.8.3"
CALLS: dict[str, int] = {}  # function -> calls


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """(B, L, H, d), keys and values (B, S, h, d) -> (B, L, H, d); causal masks are aligned at the end."""
    _count("flash_attn_func")
    _check(q, k, v, 4)
    rows = [_attend(*row, softmax_scale, causal, window_size, softcap) for row in zip(q, k, v)]
    return torch.stack(rows)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """(T, H, d), keys and values (S, h, d), bounds of N samples (N + 1) -> (T, H, d)."""
    _count("flash_attn_varlen_func")
    _check(q, k, v, 3)
    if block_table is not None:
        raise NotImplementedError("the stand-in has no paged keys and values")
    bounds = [
        _bounds("q", cu_seqlens_q, q, max_seqlen_q),
        _bounds("k", cu_seqlens_k, k, max_seqlen_k),
    ]
    if len(bounds[0]) != len(bounds[1]):
        raise RuntimeError("cu_seqlens_q and cu_seqlens_k must have shape (batch_size + 1)")
    parts = [
        _attend(q[slice(*a)], k[slice(*b)], v[slice(*b)], softmax_scale, causal, window_size, softcap)
        for a, b in zip(*bounds)
    ]
    return torch.cat(parts)


def flash_attn_with_kvcache(*args: Any, **kwargs: Any) -> Tensor:
    raise NotImplementedError("the stand-in has no paged keys and values")


def _count(name: str) -> None:
    CALLS[name] = CALLS.get(name, 0) + 1


def _check(q: Tensor, k: Tensor, v: Tensor, dims: int) -> None:
    """
    Raises:
        RuntimeError: operands that the kernels refuse.
    """
    if {q.dtype, k.dtype, v.dtype} not in ({torch.bfloat16}, {torch.float16}):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not x.is_cuda:
            raise RuntimeError(f"{name} must be on CUDA")
        if x.dim() != dims or x.stride(-1) != 1:
            raise RuntimeError(f"Input tensor must have {dims} dimensions and contiguous last dimension")
    if q.shape[-1] > 256 or q.shape[-1] != k.shape[-1] or k.shape != v.shape:
        raise RuntimeError(
            "FlashAttention forward only supports head dimension at most 256, the same for all"
        )
    if q.shape[-2] % k.shape[-2]:
        raise RuntimeError("Number of heads in key/value must divide number of heads in query")


def _bounds(name: str, starts: Tensor, tokens: Tensor, longest: int) -> list[tuple[int, int]]:
    """
    Raises:
        RuntimeError: bounds that the kernel refuses, or with which it would read beyond its input.
        TypeError: `longest` is a tensor.
    """
    if not isinstance(longest, int):
        raise TypeError(f"max_seqlen_{name} must be an int, got {type(longest).__name__}")
    if starts.dtype != torch.int32 or not starts.is_contiguous() or not starts.is_cuda:
        raise RuntimeError(f"cu_seqlens_{name} must be contiguous, on CUDA and have dtype int32")
    host = getattr(starts, "host", starts)  # the kernel reads them on the device: nobody waits
    values = [int(value) for value in host.numpy()]
    samples = list(itertools.pairwise(values))
    if values[0] != 0 or values[-1] != len(tokens) or any(not 0 <= b - a <= longest for a, b in samples):
        raise RuntimeError(f"cu_seqlens_{name} {values} for {len(tokens)} tokens, at most {longest} each")
    return samples


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
) -> Tensor:
    """One sample: (L, H, d), (S, h, d) -> (L, H, d)."""
    repeats = q.shape[1] // k.shape[1]
    keys, values = (x.float().repeat_interleave(repeats, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    before, after = window_size
    after = 0 if causal else after
    # a query's own position is aligned with the end of the keys
    own = torch.arange(len(q), device=q.device)[:, None] + len(k) - len(q)
    distance = torch.arange(len(k), device=q.device)[None] - own
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    hidden = hidden | (distance > after) if after >= 0 else hidden
    hidden = hidden | (distance < -before) if before >= 0 else hidden
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
