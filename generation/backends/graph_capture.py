"""Capture of a decode step as a CUDA graph on the model's own device.

Not run on a GPU yet; tests/device runs it on a pretended one.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from open_unitok.core.devices import current_device

_capturing = threading.Lock()  # captures share a stream


class EmptyGraphError(RuntimeError):
    """A captured graph that does nothing: its replays would leave garbage as results."""


def capture_step(
    step: Callable[[], None], counters: Sequence[Tensor], device: torch.device
) -> Callable[[], None]:
    """Capture `step` as one graph; returns the function that replays it.

    Args:
        step: reads and writes only tensors of fixed address on `device`.
        counters: the tensors that `step` increments; they have their old values afterwards.

    Raises:
        EmptyGraphError: a replay does not advance the counters.
        RuntimeError: CUDA refuses the capture.
    """
    start = [counter.clone() for counter in counters]

    # trial runs advance the counters; what they write to caches and codes is overwritten by the replay
    def rewind() -> None:
        for counter, value in zip(counters, start):
            counter.copy_(value)

    def replay() -> None:
        with current_device(device):  # a thread may have another one
            graph.replay()

    # streams and graphs belong to the current device: with another one the graph would be empty
    with _capturing, current_device(device):
        try:
            stream = _side_stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            # warm-up: libraries such as cuBLAS initialise in the first runs, which a capture does not allow
            with torch.cuda.stream(stream):
                for _ in range(2):
                    step()
                    rewind()
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: what other threads do meanwhile, which CUDA forbids by default, is no error
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                step()
        except RuntimeError:
            rewind()
            raise
    replay()
    if any(bool((counter == value).any()) for counter, value in zip(counters, start)):
        raise EmptyGraphError(f"The CUDA graph captured on {device} is empty: use backend = 'torch'.")
    rewind()
    return replay


@functools.cache
def _side_stream(device: torch.device) -> Any:
    """The stream on which steps are captured, which CUDA does not allow on the default one."""
    return torch.cuda.Stream(device)
