"""Capture of a step with torch.cuda's functions replaced: on which device and stream, and what is refused."""

import contextlib
import threading

import pytest
import torch

from open_unitok.generation.backends import graph_capture
from open_unitok.generation.backends.graph_capture import EmptyGraphError, capture_step

SECOND = torch.device("cuda", 1)


class FakeCuda:
    """Two devices. As in CUDA, only kernels of the stream that is captured enter the graph."""

    def __init__(self, patch):
        self.current, self.modes, self.on_stream, self.graphs = 0, [], [], []
        for name in ("Stream", "current_stream", "device", "graph", "CUDAGraph"):
            patch.setattr(torch.cuda, name, getattr(self, name))
        patch.setattr(torch.cuda, "stream", self.stream)
        graph_capture._side_stream.cache_clear()

    def Stream(self, device=None):
        return FakeStream(self.current if device is None else device.index)

    current_stream = Stream

    @contextlib.contextmanager
    def device(self, device):
        before, self.current = self.current, device.index
        yield
        self.current = before

    @contextlib.contextmanager
    def stream(self, stream):
        with self.device(torch.device("cuda", stream.index)):
            self.on_stream.append(stream)
            yield
            self.on_stream.pop()

    def CUDAGraph(self):
        graph = FakeGraph(self)
        self.graphs.append(graph)
        return graph

    @contextlib.contextmanager
    def graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        self.modes.append(capture_error_mode)
        graph.index, self.capturing = stream.index, graph
        yield
        self.capturing = None


class FakeStream:
    def __init__(self, index):
        self.index = index

    def wait_stream(self, other):
        assert other.index == self.index


class FakeGraph:
    def __init__(self, cuda):
        self.cuda, self.step = cuda, None

    def replay(self):
        assert self.cuda.current == self.index, "a graph is replayed on another device"
        if self.step:
            self.step()


class Model:
    """A step whose kernels are launched on `index`."""

    def __init__(self, cuda, index):
        self.cuda, self.index, self.counter, self.calls = cuda, index, torch.zeros(1), 0
        cuda.capturing = None

    def step(self):
        self.calls += 1
        if (graph := self.cuda.capturing) is not None and graph.index == self.index:
            graph.step = lambda: self.counter.add_(1)
        else:  # not captured, or launched at once on the other device's own stream
            self.counter += 1


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


def test_a_step_is_captured_on_its_own_device(cuda):
    model = Model(cuda, 1)
    replay = capture_step(model.step, [model.counter], SECOND)
    assert model.counter.item() == 0 and model.calls == 3  # two warm-ups and the capture
    replay()
    replay()
    assert model.counter.item() == 2 and model.calls == 3
    assert cuda.current == 0 and cuda.modes == ["thread_local"]
    # from another thread, which starts on cuda:0
    thread = threading.Thread(target=replay)
    thread.start()
    thread.join()
    assert model.counter.item() == 3


def test_an_empty_graph_is_refused(cuda):
    model = Model(cuda, 0)  # the kernels go elsewhere than to the captured stream
    with pytest.raises(EmptyGraphError, match="The CUDA graph captured on cuda:1 is empty"):
        capture_step(model.step, [model.counter], SECOND)


def test_without_the_device_guard_the_graph_is_empty(cuda, monkeypatch):
    """What the guard is for: a stream without a device is that of the current one."""
    monkeypatch.setattr(graph_capture, "current_device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(graph_capture, "_side_stream", lambda device: torch.cuda.Stream())
    monkeypatch.setattr(cuda, "current_stream", lambda device: FakeStream(0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream(0))
    model = Model(cuda, 1)
    with pytest.raises(EmptyGraphError):
        capture_step(model.step, [model.counter], SECOND)


def test_a_refused_capture_leaves_the_counters(cuda):
    model = Model(cuda, 1)

    def step():
        model.step()
        if cuda.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        capture_step(step, [model.counter], SECOND)
    assert model.counter.item() == 0
