"""The CUDA-graph backend: embedder, decoder, K depth steps and sampling of one visual token in one launch.

A graph replays fixed kernels on fixed addresses. Therefore every cache has its full length from the start,
unfilled entries are masked, and every counter is a tensor on the device.

B images, R rows of the batch, T length of the decoder's cache, N visual tokens per image, K sub-codebooks.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..kv_cache import PreallocatedLayer
from .eager import Eager
from .graph_capture import EmptyGraphError, capture_step

MIN_STEPS = 8  # with fewer decode steps a capture costs more than it saves
STATIC_ROPE = {"default", "linear", "llama3", "yarn"}  # RoPE tables that do not depend on the length
_log = logging.getLogger(__name__)


def cuda_graph_obstacle(model: Any) -> str | None:
    """Why a model on CUDA cannot be captured; None if every layer attends to the whole cache."""
    config = model.language_model.config
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    masked = config._attn_implementation in ("sdpa", "eager")  # others do not accept a 4D mask
    # sliding-window layers are of another type, which cannot be written at a fixed address
    layers = DynamicCache(config=config).layers
    if not masked:
        return f"attention {config._attn_implementation!r} does not accept a 4D mask"
    if rope not in STATIC_ROPE:
        return f"RoPE of type {rope!r} depends on the length"
    if not all(type(layer) is DynamicLayer for layer in layers):
        return "not every layer attends to the whole cache"
    return None


class CudaGraph(Eager):
    """See `base.Backend`; `compile_step` captures the graph.

    Attributes:
        counters: the tensors that a step increments, beside the caller's.
    """

    counters: tuple[Tensor, ...]

    def prefill(self, rows: Sequence[Sequence[int]], prefix: Tensor) -> None:
        """As `Eager`; then the caches are replaced by static ones."""
        super().prefill(rows, prefix)
        decoder, device = self.decoder, self.hidden.device
        layers = [layer for layer in decoder.cache.layers if isinstance(layer, PreallocatedLayer)]
        capacity = layers[0].buffers[0].shape[2]
        # cache index and position differ by the row's padding
        self.visual_index = torch.tensor([self.num_read], device=device)  # of the next token in the image
        self.cache_index = torch.tensor([decoder.length], device=device)  # of the next token in the KV cache
        self.positions = decoder.positions.clone()  # (R, 1), RoPE positions of the last token
        self.counters = (self.visual_index, self.cache_index, self.positions)
        self.cache_range = torch.arange(capacity, device=device)
        self.padding_mask = None if decoder.mask is None else decoder.mask.bool()[:, :capacity]
        for i, layer in enumerate(layers):
            decoder.cache.layers[i] = StaticLayer(layer.buffers, decoder.length, self.cache_index)
        if self.embedder_cache is not None:
            length = self.model.config.num_image_tokens
            self.embedder_cache = StaticProjectionCache(self.embedder_cache, length, self.visual_index)

    def decode_step(self, codes: Tensor) -> None:
        """Feed the codes (B, K); all shapes are fixed, and the host never waits for the device."""
        model, decoder = self.model, self.decoder
        vectors = model.visual_embedder.step(codes.unsqueeze(1), self.embedder_cache).to(self.hidden.dtype)
        visible = (self.cache_range <= self.cache_index)[None]  # (1, T): filled, or written in this step
        visible = visible if self.padding_mask is None else visible & self.padding_mask
        if model.language_model.config._attn_implementation == "eager":  # adds the mask to the scores
            visible = self.hidden.new_zeros(visible.shape).masked_fill(~visible, -torch.inf)
        self.positions += 1
        # (R, 1, 1, T): one query per row, the same for all heads
        self.hidden = decoder.language_model(
            inputs_embeds=vectors.repeat(self.rows_per_image, 1, 1),
            attention_mask=visible[:, None, None].expand(len(self.positions), -1, -1, -1),
            position_ids=self.positions,
            past_key_values=decoder.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        self.visual_index += 1
        self.cache_index += 1

    def compile_step(self, step: Callable[[], None], counters: Sequence[Tensor]) -> Callable[[], None]:
        """Capture `step` as one graph; if that fails, log the reason and return `step`."""
        try:
            return capture_step(step, (*counters, *self.counters), self.hidden.device)
        except EmptyGraphError:
            raise
        except RuntimeError as error:
            _log.warning("Generating without a CUDA graph: %s", str(error).splitlines()[0])
            return step


class StaticLayer(DynamicLayer):
    """KV-cache layer (R, heads, T, width) that is written at an index held in a tensor."""

    def __init__(self, buffers: Sequence[Tensor], length: int, index: Tensor):
        super().__init__()
        self.lazy_initialization(*buffers)
        for buffer in buffers:
            buffer[:, :, length:] = 0  # masked entries get weight 0, but 0 * NaN is NaN
        self.keys, self.values = buffers
        self.index = index

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write (R, heads, 1, width); return the whole buffers, including the unfilled part."""
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, self.index, key_states)
        self.values.index_copy_(2, self.index, value_states)
        return self.keys, self.values


class StaticProjectionCache:
    """Static KV cache of the causal projection for all N visual tokens; `mask` hides the unfilled part.

    Args:
        cache: the `KVCache` of the visual tokens so far.
        index: (1,) index of the next visual token.
    """

    def __init__(self, cache: Any, length: int, index: Tensor):
        self.buffers: list[Tensor] = []
        self.earlier, self.length, self.index = cache, length, index
        self.token_range = torch.arange(length, device=index.device)

    @property
    def mask(self) -> Tensor:
        """(1, N), True for the tokens so far, including that of this step."""
        return (self.token_range <= self.index)[None]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, heads, 1, d); return all N entries."""
        if not self.buffers:  # allocated in the warm-up, when the shapes are known, not during capture
            shape, filled = (*key.shape[:2], self.length, key.shape[3]), self.earlier.length
            self.buffers = [key.new_zeros(shape), value.new_zeros(shape)]
            for buffer, states in zip(self.buffers, (self.earlier._keys, self.earlier._values)):
                if filled:
                    buffer[:, :, :filled] = states[:, :, :filled]
        for buffer, new in zip(self.buffers, (key, value)):
            buffer.index_copy_(2, self.index, new)
        return self.buffers[0], self.buffers[1]
