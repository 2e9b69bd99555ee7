"""Streams, events and captured graphs of the emulated device.

A capture records the operators whose device's current stream is the captured one; what they wrote is undone
at its end. A replay runs the recorded operators on the same memory. An operator on another device or stream
is not recorded but runs, as with CUDA: a capture on the wrong device gives an empty graph.
"""

import threading
import time
import warnings
from typing import Any

import torch

from .log import LOG, place

CAPTURING = "CUDA error: operation not permitted when stream is capturing"
INVALIDATED = "CUDA error: operation failed due to a previous error during capture"
SYNCHRONIZING = "called a synchronizing CUDA operation"
_debug = {"sync": 0}
_current = threading.local()  # device index -> stream, per thread
_captures: dict["Stream", "CUDAGraph"] = {}


class Stream:
    """A stream of one device; without a device, of the current one."""

    device_type = int(torch._C._autograd.DeviceType.CUDA)
    _count = 0

    def __init__(self, device: Any = None, priority: int = 0, stream_id: int | None = None, **ignored: Any):
        index = ignored.get("device_index")
        index = torch.cuda._utils._get_device_index(device, optional=True) if index is None else index
        self.device = torch.device("cuda", index)
        self.device_index = index
        if stream_id is None:
            Stream._count += 1
            stream_id = Stream._count
        self.stream_id = self.cuda_stream = stream_id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[int, int]:
        return (self.device_index, self.stream_id)

    def __repr__(self) -> str:
        return f"<emulated stream {self.stream_id} of {self.device}>"

    def wait_stream(self, other: "Stream") -> None: ...

    def wait_event(self, event: "Event") -> None: ...

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        sync("stream.synchronize")


class Event:
    """An event, with the host's clock."""

    def __init__(self, enable_timing: bool = False, **ignored: Any):
        self.time = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.time = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        sync("event.synchronize")

    def elapsed_time(self, end: "Event") -> float:
        sync("event.elapsed_time")
        return 1000 * (end.time - self.time)


def current_stream(device: Any = None) -> Stream:
    """This thread's current stream of a device."""
    index = torch.cuda._utils._get_device_index(device, optional=True)
    streams = _current.__dict__
    return streams[f"{index}"] if f"{index}" in streams else default_stream(index)


def default_stream(device: Any = None) -> Stream:
    return Stream(device, stream_id=0)


def set_stream(stream: Stream | None) -> None:
    """Also makes the stream's device the current one."""
    if stream is not None:
        torch.cuda.set_device(stream.device_index)
        setattr(_current, f"{stream.device_index}", stream)


def capture_on(device: torch.device) -> "CUDAGraph | None":
    """The graph that records this thread's operators on `device`."""
    if not _captures:
        return None
    stream = _current.__dict__.get(f"{device.index}")
    return None if stream is None else _captures.get(stream)


def sync(kind: str) -> None:
    """Count a host synchronisation, or refuse it as CUDA does while a stream is captured.

    Another thread is refused too in capture mode "global"; CUDA forbids it most calls that wait or allocate.
    """
    thread = threading.get_ident()
    for graph in _captures.values():
        if graph.mode == "global" or (graph.thread == thread and graph.mode == "thread_local"):
            graph.invalid = True
            LOG.refused.append((kind, place()))
            raise RuntimeError(f"{CAPTURING} ({kind} at {place()})")
    LOG.syncs[kind, place()] += 1
    if _debug["sync"] and kind != "synchronize":
        if _debug["sync"] == 2:
            raise RuntimeError(SYNCHRONIZING)
        warnings.warn(f"{SYNCHRONIZING} ({kind} at {place()})", stacklevel=2)


def set_sync_debug_mode(mode: int) -> None:
    """0, or 1 to warn, or 2 to raise at every host synchronisation but torch.cuda.synchronize."""
    _debug["sync"] = mode


class CUDAGraph:
    """Records operators as (function, args, kwargs, results) on CPU tensors."""

    def __init__(self, keep_graph: bool = False):
        self.calls: list[tuple[Any, tuple, dict, Any]] = []
        self.generators: list[torch.Generator] = []
        self.stream: Stream | None = None
        self._reset_undo()

    def _reset_undo(self) -> None:
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []  # tensor, what it held
        self.outside: set[int] = set()  # addresses of memory that existed before the capture
        self.made: dict[int, torch.Tensor] = {}  # address -> result that the capture allocated
        self.invalid = False

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generators.append(generator)

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global", **ignored: Any) -> None:
        stream = current_stream()
        if stream.stream_id == 0:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        self.calls.clear()
        self._reset_undo()
        self.stream, self.mode, self.thread = stream, capture_error_mode, threading.get_ident()
        _captures[stream] = self

    def capture_end(self) -> None:
        if self.stream is None or _captures.pop(self.stream, None) is not self:
            raise RuntimeError("capture_end without capture_begin")
        for tensor, value in reversed(self.before):
            tensor.copy_(value)
        for tensor in self.made.values():  # nothing has run: results hold garbage until the first replay
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
        invalid = self.invalid
        self._reset_undo()
        if invalid:
            self.calls.clear()
            raise RuntimeError(INVALIDATED)
        if not self.calls:
            warnings.warn(
                "The CUDA Graph is empty. This usually means that the graph was attempted to be captured on "
                "wrong device or stream.",
                stacklevel=2,
            )

    def record(self, function: Any, args: tuple, kwargs: dict, written: list[torch.Tensor]) -> Any:
        """Run an operator on CPU tensors while it is recorded."""
        given = tensors_of((*args, *kwargs.values()))
        self.before += [(x, x.clone()) for x in written]
        self.outside |= {address(x) for x in given} - self.made.keys()
        out = function(*args, **kwargs)
        for x in tensors_of(out):
            if x.numel() and address(x) not in self.outside:
                self.made.setdefault(address(x), x)
        self.calls.append((function, args, kwargs, out))
        return out

    def replay(self) -> None:
        LOG.replays += 1
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction(), torch.no_grad():
            for function, args, kwargs, out in self.calls:
                new = function(*args, **kwargs)
                for fresh, kept in zip(tensors_of(new), tensors_of(out)):
                    if address(fresh) != address(kept):
                        kept.copy_(fresh)

    def instantiate(self) -> None: ...

    def reset(self) -> None:
        self.calls.clear()

    def pool(self) -> tuple[int, int]:
        return (0, id(self))


def tensors_of(x: Any) -> list[torch.Tensor]:
    """The tensors among the arguments or results of an operator, which are tensors or lists of them."""
    if isinstance(x, torch.Tensor):
        return [x]
    return [tensor for y in x for tensor in tensors_of(y)] if isinstance(x, (list, tuple)) else []


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def graph_pool_handle() -> tuple[int, int]:
    return (0, 1)


def is_current_stream_capturing() -> bool:
    return current_stream() in _captures
