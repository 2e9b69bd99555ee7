"""Decode steps with tensors of fixed address, and the captured ones of a model kept for later batches.

A CUDA graph replays fixed kernels on fixed addresses. A later batch of the same shape copies its tensors to
these addresses and replays, instead of capturing again. Not run on a GPU yet.
"""

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .graph_capture import EmptyGraphError, capture_step

MAX_KEPT = 16  # captured steps of one model that wait for their next batch
KEPT_SHARE = 1 / 4  # of the GPU's memory, which their tensors take at most
CAPACITY_MULTIPLE = 64  # of KV-cache lengths; masks of SDPA's memory-efficient kernel need a multiple of 16

_kept: "weakref.WeakKeyDictionary[nn.Module, KeptSteps]" = weakref.WeakKeyDictionary()
_lock = threading.Lock()  # of `_kept` and of what it holds
_log = logging.getLogger(__name__)


class CapturedStep:
    """The tensors of one decode step by name, and its graph once it is captured.

    It holds no reference to the model, and therefore may be kept as long as the model lives.
    """

    def __init__(self, pool: Any = None):
        self.tensors: dict[str, Tensor] = {}
        self.replay: Callable[[], None] | None = None
        self.pool = pool

    def buffer(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """The tensor of this name; the first time zeros with dtype and device of `like`."""
        if name not in self.tensors:
            # what is made in inference mode cannot be written outside of it
            with torch.inference_mode(False):
                self.tensors[name] = torch.zeros(tuple(shape), dtype=like.dtype, device=like.device)
        return self.tensors[name]

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor of this name, which now has the values of `tensor`."""
        return self.buffer(name, tensor.shape, tensor).copy_(tensor)

    def compile(self, step: Callable[[], None], state: Sequence[Tensor]) -> Callable[[], None]:
        """The graph of `step`, captured the first time; if that fails, log the reason and return `step`.

        Raises:
            EmptyGraphError: see `capture_step`.
        """
        if self.replay is None:
            try:
                self.replay = capture_step(step, state, state[0].device, self.pool)
            except EmptyGraphError:
                raise
            except RuntimeError as error:
                _log.warning("Generating without a CUDA graph: %s", str(error).splitlines()[0])
                return step
        return self.replay


class KeptSteps:
    """The captured steps of one model that no batch uses, the least recently used first."""

    def __init__(self, weights: Hashable):
        self.weights = weights  # addresses
        self.steps: dict[Hashable, CapturedStep] = {}
        # graphs that replay on one stream never run at the same time and share their temporary memory
        self.pools: dict[int, Any] = {}

    def evict(self, max_bytes: float) -> None:
        """Drop the oldest steps beyond the limits."""
        sizes = {key: sum(t.nbytes for t in step.tensors.values()) for key, step in self.steps.items()}
        while len(sizes) > MAX_KEPT or sum(sizes.values()) > max_bytes:
            oldest = next(iter(sizes))
            del sizes[oldest], self.steps[oldest]


@contextlib.contextmanager
def borrow_step(model: nn.Module, key: Hashable) -> Iterator[CapturedStep]:
    """Context manager: the captured step of a model for one batch; no other batch gets it meanwhile.

    A graph reads the weights at their addresses: changes in place take effect, and when an address changes
    the kept steps are dropped.

    Args:
        key: what the graph holds as constants: shapes and sampling settings.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":  # the same step without a graph
        yield CapturedStep()
        return
    stream = torch.cuda.current_stream(device).cuda_stream  # replays run on the caller's stream
    weights = tuple(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()))
    with _lock:
        if model not in _kept or _kept[model].weights != weights:
            _kept[model] = KeptSteps(weights)
        kept = _kept[model]
        if stream not in kept.pools:
            kept.pools[stream] = torch.cuda.graph_pool_handle()
        # two batches of the same key at a time: the second one captures its own
        step = kept.steps.pop((key, stream), None) or CapturedStep(kept.pools[stream])

    def put_back() -> None:
        limit = KEPT_SHARE * torch.cuda.get_device_properties(device).total_memory
        with _lock:
            kept.steps[key, stream] = step
            kept.evict(limit)

    try:
        yield step
    except GeneratorExit:  # a stream that is closed early
        put_back()
        raise
    except torch.OutOfMemoryError:  # the caller may try again with fewer rows
        release_steps(model)
        raise
    put_back()


def release_steps(model: nn.Module) -> None:
    """Drop the captured steps that are kept for a model."""
    with _lock:
        _kept.pop(model, None)


def round_up(length: int) -> int:
    """The length of a KV cache for `length` entries, so that batches of similar lengths share a graph."""
    return -(-length // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE
