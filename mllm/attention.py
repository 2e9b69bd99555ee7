"""Attention implementations of a transformers decoder: which one is set, and eager for attention weights."""

import contextlib
from collections.abc import Iterator
from typing import Any


def uses_flash_attention(decoder: Any) -> bool:
    """True for attention that separates packed samples by cu_seqlens instead of a mask."""
    return "flash" in str(decoder.config._attn_implementation)


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
