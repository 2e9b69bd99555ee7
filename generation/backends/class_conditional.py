"""The backends of class-conditional models: eager operators, and the same steps on static caches for a CUDA
graph.

A prompt is one class; the sampling loop, guidance and the depth head's steps are those of the MLLM.

B images, R rows of the batch (B, or 2B under guidance), n given visual tokens, K sub-codebooks, N visual
tokens per image.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ..kv_cache import expand_cache
from .captured_step import round_up
from .cuda_graph import CudaGraph
from .eager import Eager
from .static_cache import StaticCache


class ClassEager(Eager):
    """See `base.Backend`."""

    def prefill(self, rows: Sequence[Sequence[int]], prefix: Tensor) -> None:
        """Prefill R classes, each a row of one integer, and the given codes (B, n, K)."""
        model, given = self.model, prefix.shape[1]
        self.rows_per_image, self.num_read = len(rows) // len(prefix), given
        classes = torch.tensor([row[0] for row in rows], device=prefix.device)
        self.rotary = self.keep("rotary", model.rotary())
        vectors = torch.cat([model.embed_classes(classes), self._embed(prefix)], dim=1)
        self.cache = DynamicCache()
        self.hidden = model.decode(vectors, self.rotary[: given + 1], self.cache)[:, -1]
        steps = self.steps_to_reserve(given) - given
        self.cache: Any = expand_cache(self.cache, torch.arange(len(rows), device=prefix.device), steps)

    def _feed(self, codes: Tensor, start: int | Tensor) -> None:
        """Embed the codes (B, 1, K) of visual token `start` and run the decoder on them."""
        # the class is at position 0
        rotary = self.rotary[start + 1 : start + 2]
        self.hidden = self.model.decode(self._embed(codes), rotary, self.cache)[:, -1]

    def _embed(self, codes: Tensor) -> Tensor:
        """(B, n, K) -> (R, n, D): conditional and unconditional rows get the same image."""
        return self.model.embed_codes(codes).repeat(self.rows_per_image, 1, 1)


class ClassCudaGraph(ClassEager, CudaGraph):
    """See `base.Backend`; `compile_step` captures the graph."""

    def prefill(self, rows: Sequence[Sequence[int]], prefix: Tensor) -> None:
        """As `ClassEager`; then the caches are replaced by static ones."""
        super().prefill(rows, prefix)
        length, left = self.num_read + 1, self.model.config.num_image_tokens - 1 - self.num_read
        self.cache = StaticCache(self.captured, self.cache.layers, length, round_up(length + left))
        self.counters = (self.cache.index,)

    def decode_step(self, codes: Tensor) -> None:
        """Feed the codes (B, K); all shapes are fixed, and the host never waits for the device."""
        vectors = self._embed(codes.unsqueeze(1))
        rotary = self.rotary.index_select(0, self.cache.index)
        self.hidden = self.model.decode(vectors, rotary, self.cache.layers, self.cache.bias(vectors))[:, -1]
        self.cache.index += 1
