"""Capture of a decode step as a CUDA graph on the model's own device.

Not run on a GPU yet; tests/device runs it on an emulated one.
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
    step: Callable[[], None], state: Sequence[Tensor], device: torch.device, pool: Any = None
) -> Callable[[], None]:
    """Capture `step` as one graph; returns the function that replays it.

    Args:
        step: reads and writes only tensors of fixed address on `device`.
        state: the tensors that `step` reads and then changes, a counter first; they are restored afterwards.
        pool: of the graph's temporary memory; None = one of its own.

    Raises:
        EmptyGraphError: a replay does not advance the counter.
        RuntimeError: CUDA refuses the capture.
    """
    start = [tensor.clone() for tensor in state]

    # trial runs advance the state; what they write to caches is overwritten by the replay
    def rewind() -> None:
        for tensor, value in zip(state, start):
            tensor.copy_(value)

    def replay() -> None:
        with current_device(device):  # a thread may have another one
            graph.replay()

    # streams and graphs belong to the current device: with another one the graph would be empty
    with _capturing, current_device(device):
        stream, caller = _side_stream(device), torch.cuda.current_stream(device)
        try:
            with torch.cuda.stream(caller):  # torch.cuda.graph does not leave its stream if the capture fails
                stream.wait_stream(caller)
                # warm-up: libraries such as cuBLAS initialise in the first runs, which a capture forbids
                with torch.cuda.stream(stream):
                    for _ in range(2):
                        step()
                        rewind()
                caller.wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                # thread_local: what other threads do meanwhile, which CUDA forbids by default, is no error
                with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                    step()
        except RuntimeError:
            caller.wait_stream(stream)
            rewind()
            raise
    rewind()  # on a wrong stream the step has run instead of being captured
    replay()
    if bool((state[0] == start[0]).any()):
        raise EmptyGraphError(f"The CUDA graph captured on {device} is empty: use backend = 'torch'.")
    rewind()
    return replay


@functools.cache
def _side_stream(device: torch.device) -> Any:
    """The stream on which steps are captured, which CUDA does not allow on the default one."""
    return torch.cuda.Stream(device)
