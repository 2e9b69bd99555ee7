"""The CUDA-graph backend: embedder, decoder, K depth steps and sampling of one visual token in one launch.

B images, R rows of the batch, N visual tokens per image, K sub-codebooks.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from open_unitok.mllm.attention import VARLEN

from .captured_step import CapturedStep, round_up
from .eager import Eager
from .static_cache import StaticDecoder, StaticProjectionCache

MIN_STEPS = 8  # with fewer decode steps a capture costs more than it saves
STATIC_ROPE = {"default", "linear", "llama3", "yarn"}  # RoPE tables that do not depend on the length


def cuda_graph_obstacle(model: Any) -> str | None:
    """Why a model on CUDA cannot be captured; None if every layer attends to the whole cache."""
    config = model.language_model.config
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    masked = config._attn_implementation in ("sdpa", "eager", VARLEN)  # others do not accept a 4D mask
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

    Args:
        captured: the step of an earlier batch of the same shape; None = a new one.

    Attributes:
        counters: the tensors that a step increments, beside the caller's.
    """

    counters: tuple[Tensor, ...]

    def __init__(self, model: Any, captured: CapturedStep | None = None):
        super().__init__(model)
        self.captured = captured or CapturedStep()

    def prefill(self, rows: Sequence[Sequence[int]], prefix: Tensor) -> None:
        """As `Eager`; then the caches are replaced by static ones."""
        super().prefill(rows, prefix)
        left = self.model.config.num_image_tokens - 1 - self.num_read
        self.decoder = StaticDecoder(self.captured, self.decoder, round_up(self.decoder.length + left))
        index = torch.full((1,), self.num_read, device=self.hidden.device)
        self.visual_index = self.captured.keep("visual_index", index)  # of the next token in the image
        self.counters = (self.visual_index, *self.decoder.counters)
        if self.embedder_cache is not None:
            self.embedder_cache = StaticProjectionCache(self.captured, self.embedder_cache, self.visual_index)

    def steps_to_reserve(self, num_given: int) -> int:
        """Only the given tokens are fed to the cache of the prefill."""
        return num_given

    def decode_step(self, codes: Tensor) -> None:
        """Feed the codes (B, K); all shapes are fixed, and the host never waits for the device."""
        self._feed(codes.unsqueeze(1), self.visual_index)
        self.num_read += 1
        self.visual_index += 1

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor at the address that the graph uses for this name, with the values of `tensor`."""
        return self.captured.keep(name, tensor)

    def compile_step(self, step: Callable[[], None], state: Sequence[Tensor]) -> Callable[[], None]:
        """Capture `step` as one graph, or take that of an earlier batch; if that fails, return `step`."""
        return self.captured.compile(step, (*state, *self.counters))
