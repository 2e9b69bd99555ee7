"""KV caches whose addresses and lengths do not change from step to step, as a CUDA graph needs them.

Every cache has its full length from the start, unfilled entries are masked, and every counter is a tensor on
the device.

R rows of the batch, T entries of the decoder's cache, D decoder width, B images, N visual tokens per image.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..kv_cache import CachedDecoder
from .captured_step import CapturedStep


class StaticLayer(DynamicLayer):
    """KV-cache layer (R, heads, T, width) that is written at an index held in a tensor."""

    def __init__(self, keys: Tensor, values: Tensor, index: Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.index = keys, values, index

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write (R, heads, 1, width); return the whole buffers, including the unfilled part."""
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, self.index, key_states)
        self.values.index_copy_(2, self.index, value_states)
        return self.keys, self.values


class StaticCache:
    """The KV cache of all layers, filled from a prefilled one.

    Args:
        captured: owns the tensors.
        layers: prefilled, of which `length` entries are in use; they are released one by one.
        capacity: T.
        visible: (R, length) bool, False on padding; None = no padding.

    Attributes:
        layers: a transformers cache.
        index: (1,) of the next entry.
    """

    def __init__(
        self,
        captured: CapturedStep,
        layers: list[Any],
        length: int,
        capacity: int,
        visible: Tensor | None = None,
    ):
        self.layers = DynamicCache()
        device = layers[0].keys.device
        self.index = captured.keep("cache_index", torch.full((1,), length, device=device))
        self.range = captured.keep("cache_range", torch.arange(capacity, device=device))
        self.visible = captured.buffer("visible", (len(layers[0].keys), capacity), self.range.bool())
        self.visible.fill_(True)
        if visible is not None:
            self.visible[:, :length] = visible
        for i in range(len(layers)):
            buffers: list[Tensor] = []
            for name, states in (("keys", layers[i].keys), ("values", layers[i].values)):
                shape = (*states.shape[:2], capacity, states.shape[3])
                buffer = captured.buffer(f"{name}.{i}", shape, states)
                buffer[:, :, :length] = states
                buffer[:, :, length:] = 0  # masked entries get weight 0, but 0 * NaN is NaN
                buffers.append(buffer)
            self.layers.layers.append(StaticLayer(buffers[0], buffers[1], self.index))
            layers[i] = None

    def bias(self, like: Tensor) -> Tensor:
        """(R, 1, 1, T) added to the scores of one new token per row: -inf but for the entries so far."""
        # once per step: of a bool mask, SDPA would make a bias in every layer
        hidden = ~((self.range <= self.index) & self.visible)
        return like.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None, None]


class StaticDecoder:
    """A `CachedDecoder` after its prefill, for decode steps of one input per row at fixed addresses.

    Attributes:
        counters: the tensors that a step increments.
    """

    def __init__(self, captured: CapturedStep, decoder: CachedDecoder, capacity: int):
        self.language_model = decoder.language_model
        visible = None if decoder.mask is None else decoder.mask[:, : decoder.length].bool()
        self.cache = StaticCache(captured, decoder.cache.layers, decoder.length, capacity, visible)
        # (R, 1) of the last token; cache index and position differ by the row's padding
        self.positions = captured.keep("positions", decoder.positions)
        self.counters = (self.cache.index, self.positions)

    def decode_step(self, vectors: Tensor) -> Tensor:
        """(R, 1, D) next inputs -> (R, D) states; all shapes are fixed, and the host never waits."""
        self.positions += 1
        hidden = self.language_model(
            inputs_embeds=vectors,
            attention_mask=self.cache.bias(vectors),  # of rank 4: transformers takes it as it is
            position_ids=self.positions,
            past_key_values=self.cache.layers,
            use_cache=True,
        ).last_hidden_state[:, -1]
        self.cache.index += 1
        return hidden


class StaticProjectionCache:
    """Static KV cache of the causal projection for all N visual tokens; `mask` hides the unfilled part.

    Args:
        captured: owns the tensors.
        cache: the `KVCache` of the visual tokens so far.
        index: (1,) index of the next visual token.
    """

    def __init__(self, captured: CapturedStep, cache: Any, index: Tensor):
        self.captured, self.cache, self.index = captured, cache, index
        self.range = captured.keep("projection.range", torch.arange(cache.max_length, device=index.device))
        # the first time the shapes are known at the first append, which is part of the warm-up
        self.buffers: Sequence[Tensor] = ()
        if "projection.keys" in captured.tensors:
            self._load()

    @property
    def mask(self) -> Tensor:
        """(1, N), True for the tokens so far, including that of this step."""
        return (self.range <= self.index)[None]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, heads, 1, d); return all N entries."""
        if not self.buffers:
            for name, states in (("keys", key), ("values", value)):
                shape = (*states.shape[:2], self.cache.max_length, states.shape[3])
                self.captured.buffer(f"projection.{name}", shape, states)
            self._load()
        for buffer, new in zip(self.buffers, (key, value)):
            buffer.index_copy_(2, self.index, new)
        return self.buffers[0], self.buffers[1]

    def _load(self) -> None:
        """Copy the tokens so far; the rest is masked, and must be finite for that."""
        self.buffers = [self.captured.tensors[f"projection.{name}"] for name in ("keys", "values")]
        filled = self.cache.length
        for buffer, states in zip(self.buffers, (self.cache._keys, self.cache._values)):
            buffer.zero_()
            if filled:
                buffer[:, :, :filled] = states[:, :, :filled]
