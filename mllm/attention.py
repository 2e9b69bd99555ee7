"""Attention of a transformers decoder: variable-length for packed rows, eager for attention weights.

"unitok_varlen" is an attention of transformers' AttentionInterface. Where the samples of a batch are known
(`SampleBounds`) it attends within each of them and needs no (B, 1, L, L) mask; elsewhere it is "sdpa".

T tokens of all samples, H heads, d width of a head.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from open_unitok.core.errors import UserError

from .positions import SampleBounds

VARLEN = "unitok_varlen"
# layers whose mask is the causal one, or a causal window
VARLEN_LAYERS = {"full_attention", "sliding_attention"}
KERNEL_HAS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters


def supports_varlen(decoder: Any) -> bool:
    """True for decoders whose attention is causal within a sample, and all through AttentionInterface."""
    config = decoder.config
    return (
        getattr(config, "attn_logit_softcapping", None) is None  # Gemma 2
        and getattr(decoder, "_supports_attention_backend", False)
        and getattr(decoder, "_supports_sdpa", False)
        and getattr(config, "is_causal", True)
        and set(getattr(config, "layer_types", None) or ()) <= VARLEN_LAYERS
    )


def bounds_arguments(decoder: Any, bounds: SampleBounds | None, shape: torch.Size) -> dict[str, Any]:
    """The decoder's arguments for a flattened batch of these samples, the mask among them.

    {} = the decoder needs the batch of `shape` (B, L) as it is: its attention takes a mask, or the samples
    are not known.
    """
    name = str(decoder.config._attn_implementation)
    if bounds is None or sum(bounds.lengths) != shape.numel():
        return {}
    if name == VARLEN:
        # a 4-D mask is taken as it is: no other one is built, and a decoder that drops the bounds fails on it
        mask = torch.empty(0, 0, 0, 0, device=bounds.starts.device)
        return {"attention_mask": mask, "sample_bounds": bounds}
    if "flash" in name:
        longest = max(bounds.lengths)
        starts = {"cu_seq_lens_q": bounds.starts, "cu_seq_lens_k": bounds.starts}
        return {"attention_mask": None, **starts, "max_length_q": longest, "max_length_k": longest}
    return {}


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    sample_bounds: SampleBounds | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Queries (1, H, T, d), keys and values of fewer heads -> (1, T, H, d), within each sample of
    `sample_bounds`; without them as "sdpa".

    A CUDA GPU in 16 bits runs torch's variable-length FlashAttention (not run on a GPU yet); a CPU, and a GPU
    in fp32, SDPA on each sample.
    """
    if sample_bounds is None:
        if attention_mask is not None and not attention_mask.numel():
            raise UserError(
                "This decoder does not hand `sample_bounds` to its attention: set attention: sdpa."
            )
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise UserError("Variable-length attention has no soft cap and no sinks: set attention: eager.")
    dtype = query.dtype
    if torch.is_autocast_enabled(query.device.type):
        # rotary tables in fp32 leave fp32 queries under autocast, which covers SDPA but not the kernel
        dtype = torch.get_autocast_dtype(query.device.type)
    has_kernel = query.is_cuda and dtype in (torch.bfloat16, torch.float16) and query.shape[-1] <= 256
    attend = _by_kernel if has_kernel and not dropout else _by_sample
    out = attend(
        query.to(dtype), key.to(dtype), value.to(dtype), sample_bounds, dropout, scaling, sliding_window
    )
    return out, None


def _by_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: SampleBounds,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    options = {}
    if (groups := query.shape[1] // key.shape[1]) > 1:
        if KERNEL_HAS_GQA:
            options["enable_gqa"] = True
        else:
            key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    # (1, heads, T, d) -> (T, heads, d)
    query, key, value = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    longest = max(bounds.lengths)
    # (tokens before, tokens after): 0 after is causal
    size = (-1 if window is None else window - 1, 0)
    starts = bounds.starts
    out = varlen_attn(
        query, key, value, starts, starts, longest, longest, scale=scaling, window_size=size, **options
    )
    return out.unsqueeze(0)  # pyright: ignore


def _by_sample(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: SampleBounds,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    parts = []
    for q, k, v in zip(*(x.split(bounds.lengths, dim=2) for x in (query, key, value))):
        length, mask = q.shape[2], None
        if window is not None and length > window:
            mask = q.new_ones(length, length, dtype=torch.bool).tril().triu(1 - window)
        part = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
        )
        parts.append(part.transpose(1, 2))
    return torch.cat(parts, dim=1)


AttentionInterface.register(VARLEN, varlen_attention)
AttentionMaskInterface.register(VARLEN, sdpa_mask)


@contextlib.contextmanager
def eager_attention(decoder: Any, only_if: bool) -> Iterator[None]:
    """Run `decoder` with eager attention, the one that computes attention weights explicitly."""
    config = decoder.config
    before = config._attn_implementation
    if only_if:
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        if only_if:
            config._attn_implementation = before
