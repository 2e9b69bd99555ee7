"""The language model behind its KV cache: prefill a batch of prompts, then one decode step per token.

U unique prompts, R rows of the batch, L longest prompt, n new inputs per row, D decoder width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .batching import pad_left


def prefill(model: Any, rows: Sequence[Sequence[int]], max_steps: int) -> "CachedDecoder":
    """Read R prompts of text ids, equal ones once; up to `max_steps` decode steps may follow."""
    index = {row: i for i, row in enumerate(dict.fromkeys(map(tuple, rows)))}
    ids, mask = pad_left(list(index), model)
    select = torch.tensor([index[tuple(row)] for row in rows], device=model.device)
    return CachedDecoder(model.language_model, model.get_input_embeddings()(ids), mask, select, max_steps)


class CachedDecoder:
    """The language model with a preallocated KV cache.

    Args:
        embeds: (U, L, D) left-padded inputs; mask: (U, L) int64, 0 on padding.
        select: (R,) for each row of the batch, its row of `embeds`. Equal prompts (unconditional rows, many
            images of one prompt) are read once and their cache is copied.
        max_steps: capacity of the cache beyond L.

    Attributes:
        hidden: (R, D) states at the last input.
        length: entries of the cache in use, padding included.
    """

    def __init__(self, language_model: Any, embeds: Tensor, mask: Tensor, select: Tensor, max_steps: int):
        self.language_model = language_model
        self.length = mask.shape[1]
        padded = bool((mask == 0).any())  # no mask is faster
        positions = (mask.cumsum(-1) - 1).clamp(min=0)  # real tokens count from 0
        cache = DynamicCache(config=language_model.config)
        states = language_model(
            inputs_embeds=embeds,
            attention_mask=mask if padded else None,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        self.hidden = states[select, -1]
        self.cache = _expand_cache(cache, select, max_steps)
        self.positions = positions[select, -1:]
        self.mask = (
            torch.cat([mask[select], mask.new_ones(len(select), max_steps)], dim=1) if padded else None
        )

    def decode_step(self, vectors: Tensor) -> Tensor:
        """(R, n, D) the next n inputs -> (R, D) states at the last of them."""
        new = vectors.shape[1]
        positions = self.positions + torch.arange(1, new + 1, device=self.positions.device)
        self.positions = positions[:, -1:]
        self.length += new
        return self.language_model(
            inputs_embeds=vectors,
            attention_mask=None if self.mask is None else self.mask[:, : self.length],
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]


class PreallocatedLayer(DynamicLayer):
    """Preallocated KV-cache layer: `update` writes in place instead of concatenating.

    Args:
        layer: the layer after prefill.
        select: (R,) the row of `layer` that each row of the batch continues.
        max_steps: capacity beyond the current length.
    """

    def __init__(self, layer: DynamicLayer, select: Tensor, max_steps: int):
        super().__init__()
        assert layer.keys is not None and layer.values is not None
        self.lazy_initialization(layer.keys, layer.values)
        self.buffers = [_preallocate(x, select, max_steps) for x in (layer.keys, layer.values)]
        self._set_length(layer.keys.shape[2])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (R, heads, n, width); return everything written so far."""
        assert self.keys is not None
        start, new = self.keys.shape[2], key_states.shape[2]
        self.buffers[0][:, :, start : start + new] = key_states
        self.buffers[1][:, :, start : start + new] = value_states
        return self._set_length(start + new)

    def _set_length(self, length: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (x[:, :, :length] for x in self.buffers)
        return self.keys, self.values


def _preallocate(states: Tensor, select: Tensor, max_steps: int) -> Tensor:
    """(U, heads, L, width) -> (R, heads, L + max_steps, width), the new part uninitialised."""
    _, heads, length, width = states.shape
    buffer = states.new_empty(len(select), heads, length + max_steps, width)
    buffer[:, :, :length] = states[select]
    return buffer


def _expand_cache(cache: Cache, select: Tensor, max_steps: int) -> Cache:
    """The cache with the rows `select` (repeats allowed) and capacity for `max_steps` more entries."""
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = PreallocatedLayer(layer, select, max_steps)
        else:  # sliding windows and the like grow as transformers has it
            layer.batch_select_indices(select)  # type: ignore[attr-defined]
    return cache
