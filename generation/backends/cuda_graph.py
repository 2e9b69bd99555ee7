"""The CUDA-graph backend: embedder, decoder, K depth steps and sampling of one visual token in one launch.

A graph replays fixed kernels on fixed addresses, so every cache has its full length from the start, what is
not yet filled is masked, and every counter is a tensor on the device.

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

MIN_STEPS = 8  # with fewer decode steps a capture costs more than it saves
STATIC_ROPE = {"default", "linear", "llama3", "yarn"}  # RoPE tables that do not depend on the length
_log = logging.getLogger(__name__)


def supports_cuda_graph(model: Any, num_steps: int) -> bool:
    """True on CUDA, where every layer attends to the whole cache and enough steps follow."""
    if model.device.type != "cuda" or num_steps < MIN_STEPS:
        return False
    config = model.language_model.config
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    masked = config._attn_implementation in ("sdpa", "eager")  # others take no 4D mask
    # sliding windows have layers of another type, which cannot be written at a fixed address
    layers = DynamicCache(config=config).layers
    return masked and rope in STATIC_ROPE and all(type(layer) is DynamicLayer for layer in layers)


class CudaGraph(Eager):
    """See `base.Backend`; `compile_step` captures the graph."""

    def prefill(self, rows: Sequence[Sequence[int]], prefix: Tensor) -> None:
        """As `Eager`; then the caches are turned into static ones."""
        super().prefill(rows, prefix)
        decoder, device = self.decoder, self.hidden.device
        layers = [layer for layer in decoder.cache.layers if isinstance(layer, PreallocatedLayer)]
        capacity = layers[0].buffers[0].shape[2]
        self.visual_index = torch.tensor([self.num_read], device=device)  # of the token fed next
        self.cache_index = torch.tensor([decoder.length], device=device)  # where it is written
        self.positions = decoder.positions.clone()  # (R, 1), of the token fed last
        self.cache_range = torch.arange(capacity, device=device)
        self.padding_mask = None if decoder.mask is None else decoder.mask.bool()[:, :capacity]
        for i, layer in enumerate(layers):
            decoder.cache.layers[i] = StaticLayer(layer.buffers, decoder.length, self.cache_index)
        if self.embedder_cache is not None:
            length = self.model.config.num_image_tokens
            self.embedder_cache = StaticProjectionCache(self.embedder_cache, length, self.visual_index)

    def decode_step(self, codes: Tensor) -> None:
        """Feed the codes (B, K): fixed shapes, and nothing that the host waits for."""
        model = self.model
        vectors = model.visual_embedder.step(codes.unsqueeze(1), self.embedder_cache).to(self.hidden.dtype)
        visible = (self.cache_range <= self.cache_index)[None]
        visible = visible if self.padding_mask is None else visible & self.padding_mask
        if model.language_model.config._attn_implementation == "eager":  # adds its mask to the scores
            visible = self.hidden.new_zeros(visible.shape).masked_fill(~visible, -torch.inf)
        self.positions += 1
        # (R, 1, 1, T): one query per row, the same for all heads
        self.hidden = model.language_model(
            inputs_embeds=vectors.repeat(self.rows_per_image, 1, 1),
            attention_mask=visible[:, None, None].expand(len(self.positions), -1, -1, -1),
            position_ids=self.positions,
            past_key_values=self.decoder.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        self.visual_index += 1
        self.cache_index += 1

    def compile_step(self, step: Callable[[], None], counters: Sequence[Tensor]) -> Callable[[], None]:
        """Capture `step` as one graph; if that fails, log why and return `step`."""
        counters = (*counters, self.visual_index, self.cache_index, self.positions)
        start = [counter.clone() for counter in counters]

        def rewind() -> None:
            for counter, value in zip(counters, start):
                counter.copy_(value)

        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries initialise themselves in the first runs
                for _ in range(2):
                    step()
                    rewind()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
        except RuntimeError as error:
            _log.warning("Generating without a CUDA graph: %s", str(error).splitlines()[0])
            rewind()
            return step
        return graph.replay


class StaticLayer(DynamicLayer):
    """KV-cache layer (R, heads, T, width) that is written at an index held in a tensor."""

    def __init__(self, buffers: Sequence[Tensor], length: int, index: Tensor):
        super().__init__()
        self.lazy_initialization(*buffers)
        for buffer in buffers:
            buffer[:, :, length:] = 0  # masked entries have weight 0, but 0 * NaN is NaN
        self.keys, self.values = buffers
        self.index = index

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write (R, heads, 1, width); return the whole buffers, the unfilled part included."""
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, self.index, key_states)
        self.values.index_copy_(2, self.index, value_states)
        return self.keys, self.values


class StaticProjectionCache:
    """Keys and values of the causal projection for all N visual tokens; `mask` hides the unfilled part.

    Args:
        cache: the `KVCache` of the visual tokens fed so far.
        index: (1,) the visual token that is fed next.
    """

    def __init__(self, cache: Any, length: int, index: Tensor):
        self.buffers: list[Tensor] = []
        self.earlier, self.length, self.index = cache, length, index
        self.token_range = torch.arange(length, device=index.device)

    @property
    def mask(self) -> Tensor:
        """(1, N), True for the tokens fed so far, the one of this step included."""
        return (self.token_range <= self.index)[None]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, heads, 1, d); return all N entries."""
        if not self.buffers:  # the first step, before any capture, shows the shapes
            shape, filled = (*key.shape[:2], self.length, key.shape[3]), self.earlier.length
            self.buffers = [key.new_zeros(shape), value.new_zeros(shape)]
            for buffer, states in zip(self.buffers, (self.earlier._keys, self.earlier._values)):
                if filled:
                    buffer[:, :, :filled] = states[:, :, :filled]
        for buffer, new in zip(self.buffers, (key, value)):
            buffer.index_copy_(2, self.index, new)
        return self.buffers[0], self.buffers[1]
