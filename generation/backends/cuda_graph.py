"""A whole position of drawing as one step over buffers that stay in place: embedder, decoder, K depth steps
and sampling. On CUDA it is captured as one graph, so that a position costs one launch.

B images, R rows of the batch, T places of the decoder's cache, N visual tokens, K sub-codebooks, V entries.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..kv_cache import PreallocatedLayer
from .eager import STATIC_ROPE, Eager

SHORT = 8  # positions for which a capture costs more than it saves
_log = logging.getLogger(__name__)


def can_fix(engine: Any, left: int) -> bool:
    """True if the rest of this drawing may be captured: on CUDA, with caches that do not slide."""
    if not isinstance(engine, Eager) or engine.hidden.device.type != "cuda" or left < SHORT:
        return False
    language_model = engine.model.language_model
    rope = (getattr(language_model.config, "rope_parameters", None) or {}).get("rope_type", "default")
    masked = language_model.config._attn_implementation in ("sdpa", "eager")  # others take no 4D mask
    return (
        masked
        and rope in STATIC_ROPE
        and all(isinstance(layer, PreallocatedLayer) for layer in engine.decoder.cache.layers)
    )


class Position:
    """Draws one visual token after the other behind an `Eager` engine that has just drawn one.

    Args:
        codes: (B, N, K), filled in place.
        guidances: one per visual token.
        noise: (K, B, V) of any position, or None where greedy.
        draw: draw(engine, guidance, noise, codes (B, K)) chooses the codes of one visual token.
    """

    def __init__(
        self,
        engine: Eager,
        codes: Tensor,
        guidances: Sequence[float],
        noise: Tensor | None,
        draw: Callable[[Any, Any, Tensor | None, Tensor], None],
    ):
        decoder, device = engine.decoder, codes.device
        self.engine, self.codes, self.draw = engine, codes, draw
        self.guidances = torch.tensor(guidances, device=device)
        self.noise = None if noise is None else noise.clone()
        buffers = [layer.buffers for layer in decoder.cache.layers if isinstance(layer, PreallocatedLayer)]
        total = buffers[0][0].shape[2]
        # counters are tensors: a graph reads them anew each time
        self.drawn = torch.tensor([engine.drawn + 1], device=device)
        self.slot = torch.tensor([decoder.length], device=device)
        self.places = decoder.positions.clone()  # (R, 1)
        self.columns = torch.arange(total, device=device)
        self.real = None if decoder.mask is None else decoder.mask.bool()[:, :total]
        for i, layer in enumerate(buffers):
            decoder.cache.layers[i] = FixedLayer(layer, decoder.length, self.slot)
        cache = engine.embedder_cache
        self.embedder_cache = None if cache is None else FixedCache(cache, codes.shape[1], self.drawn)
        self.graph: Any = None

    def run(self, noise: Tensor | None) -> None:
        """Draw the next visual token into `codes`."""
        if self.noise is not None and noise is not None:
            self.noise.copy_(noise)
        if self.graph is not None:
            self.graph.replay()
        else:
            self.step()

    def step(self) -> None:
        """The work of `run`: fixed shapes, nothing that the host waits for."""
        model = self.engine.model
        before = self.codes.index_select(1, self.drawn - 1)
        vectors = model.visual_embedder.step(before, self.embedder_cache).to(self.engine.hidden.dtype)
        seen = (self.columns <= self.slot)[None]
        seen = seen if self.real is None else seen & self.real
        if model.language_model.config._attn_implementation == "eager":  # which adds its mask
            seen = self.engine.hidden.new_zeros(seen.shape).masked_fill(~seen, -torch.inf)
        self.places += 1
        self.engine.hidden = model.language_model(
            inputs_embeds=vectors.repeat(self.engine.copies, 1, 1),
            attention_mask=seen[:, None, None].expand(len(self.places), -1, -1, -1),
            position_ids=self.places,
            past_key_values=self.engine.decoder.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        new = torch.empty_like(self.codes[:, 0])
        self.draw(self.engine, self.guidances.index_select(0, self.drawn), self.noise, new)
        self.codes.index_copy_(1, self.drawn, new.unsqueeze(1))
        self.drawn += 1
        self.slot += 1

    def capture(self) -> None:
        """Make the step one graph; where that fails, the log says why and it stays as it is."""
        counters = (self.drawn, self.slot, self.places)
        start = [counter.clone() for counter in counters]

        def back() -> None:
            for counter, value in zip(counters, start):
                counter.copy_(value)

        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries set themselves up in the first runs
                for _ in range(2):
                    self.step()
                    back()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step()
            self.graph = graph
        except RuntimeError as error:
            _log.warning("Drawing goes on without a CUDA graph: %s", str(error).splitlines()[0])
            back()


class FixedLayer(DynamicLayer):
    """Keys and values (R, heads, T, width) of one decoder layer, written at a place that is a tensor."""

    def __init__(self, buffers: Sequence[Tensor], length: int, slot: Tensor):
        super().__init__()
        self.lazy_initialization(*buffers)
        for buffer in buffers:
            buffer[:, :, length:] = 0  # what is masked counts nothing, but nothing times NaN is NaN
        self.keys, self.values = buffers
        self.slot = slot

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write (R, heads, 1, width); return all places, filled or not."""
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, self.slot, key_states)
        self.values.index_copy_(2, self.slot, value_states)
        return self.keys, self.values


class FixedCache:
    """The causal projection's keys and values of N visual tokens, likewise; `mask` hides what is to come.

    Args:
        cache: a `KeyValueCache` of the visual tokens so far.
        drawn: the visual token that is drawn next; the one before it is fed.
    """

    def __init__(self, cache: Any, length: int, drawn: Tensor):
        self.buffers: list[Tensor] = []
        self.before, self.length, self.drawn = cache, length, drawn
        self.columns = torch.arange(length, device=drawn.device)

    @property
    def mask(self) -> Tensor:
        """(1, N), True where there is something."""
        return (self.columns < self.drawn)[None]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, heads, 1, d); return all N places."""
        if not self.buffers:  # before any capture: the shapes show at the first step
            shape, seen = (*key.shape[:2], self.length, key.shape[3]), self.before.length
            self.buffers = [key.new_zeros(shape), value.new_zeros(shape)]
            for to, there in zip(self.buffers, (self.before._keys, self.before._values)):
                if seen:
                    to[:, :, :seen] = there[:, :, :seen]
        for to, new in zip(self.buffers, (key, value)):
            to.index_copy_(2, self.drawn - 1, new)
        return self.buffers[0], self.buffers[1]
