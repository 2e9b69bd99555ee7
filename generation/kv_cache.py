"""The language model behind its KV cache: prompts of any lengths once, then one step after the other.

U unique prompts, R rows of the batch, L longest prompt, n new inputs a row, D decoder width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


def prefill(model: Any, rows: Sequence[Sequence[int]], room: int) -> "CachedDecoder":
    """A decoder that has read R prompts of text ids, equal ones once, and goes on for up to `room` steps."""
    place = {row: i for i, row in enumerate(dict.fromkeys(map(tuple, rows)))}
    ids, mask = pad_left(list(place), model.config.pad_token_id or 0, model.device)
    select = torch.tensor([place[tuple(row)] for row in rows], device=model.device)
    return CachedDecoder(model.language_model, model.get_input_embeddings()(ids), mask, select, room)


class CachedDecoder:
    """The language model behind its KV cache: left-padded inputs once, then one vector per row and step.

    Args:
        embeds: (U, L, D) inputs, left-padded; mask: (U, L) int64, 0 on padding.
        select: (R,) the row of `embeds` that each row goes on from. So equal rows are read once and their
            cache is copied: the unconditional rows, many images of one prompt.
        room: how many steps will follow at most.

    Attributes:
        hidden: (R, D) states at the last place of the inputs.
    """

    def __init__(self, language_model: Any, embeds: Tensor, mask: Tensor, select: Tensor, room: int):
        self.language_model = language_model
        self.length = mask.shape[1]
        padded = bool((mask == 0).any())  # without padding no mask is needed, which is faster
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=language_model.config)
        states = language_model(
            inputs_embeds=embeds,
            attention_mask=mask if padded else None,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        self.hidden = states[select, -1]
        self.cache = spread(cache, select, room)
        self.positions = positions[select, -1:]
        self.mask = torch.cat([mask[select], mask.new_ones(len(select), room)], dim=1) if padded else None

    def step(self, vectors: Tensor) -> Tensor:
        """(R, n, D) inputs at the next n places -> (R, D) states at the last of them."""
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
    """Keys and values of one layer with room for the steps to come, which write and copy nothing else."""

    def __init__(self, layer: DynamicLayer, select: Tensor, room: int):
        super().__init__()
        assert layer.keys is not None and layer.values is not None
        self.lazy_initialization(layer.keys, layer.values)
        self.buffers = [_with_room(x, select, room) for x in (layer.keys, layer.values)]
        self._show(layer.keys.shape[2])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write (R, heads, n, width) behind what is there; return all that is there."""
        assert self.keys is not None
        start, new = self.keys.shape[2], key_states.shape[2]
        self.buffers[0][:, :, start : start + new] = key_states
        self.buffers[1][:, :, start : start + new] = value_states
        return self._show(start + new)

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (x[:, :, :length] for x in self.buffers)
        return self.keys, self.values


def _with_room(states: Tensor, select: Tensor, room: int) -> Tensor:
    _, heads, length, width = states.shape
    buffer = states.new_empty(len(select), heads, length + room, width)
    buffer[:, :, :length] = states[select]
    return buffer


def spread(cache: Cache, select: Tensor, room: int) -> Cache:
    """The cache with its rows `select`ed (repeats allowed) and room for `room` more places."""
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = PreallocatedLayer(layer, select, room)
        else:  # sliding windows and the like grow as transformers has it
            layer.batch_select_indices(select)  # type: ignore[attr-defined]
    return cache


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Ids (R, L) and mask (R, L) int64; the mask comes from the lengths: a genuine pad id stays visible."""
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def context_length(config: Any) -> int | None:
    """The decoder's context in tokens, visual ones included; None where its config names none."""
    return getattr(config.text_config, "max_position_embeddings", None)
