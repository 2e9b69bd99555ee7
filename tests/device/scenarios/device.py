"""The emulated device itself: identity of parameters, pinned copies, streams, graphs."""

import warnings

import torch
from emulated_cuda import LOG, host_copy, measure

from .parts import error_of


def scenario_modules() -> dict:
    """A module moves, and trains under autocast."""
    layer = torch.nn.Linear(4, 5)
    weight = layer.weight
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = layer.cuda()(torch.ones(3, 4, device="cuda"))
    found.float().square().mean().backward()
    assert layer.weight is weight and weight.is_cuda and weight.grad.is_cuda
    return {"device": str(found.device), "dtype": str(found.dtype), "kind": type(found).__name__}


def scenario_copies() -> dict:
    """Host synchronisations of copies to the device."""
    memory = {"pinned": torch.zeros(4).pin_memory()[1:], "pageable": torch.zeros(4)}
    return {
        f"{name}, non_blocking={flag}": measure(x.to, "cuda", non_blocking=flag)[1]["waits"]
        for name, x in memory.items()
        for flag in (False, True)
    }


def scenario_refusals() -> dict:
    """Errors of CUDA."""
    x, cpu = torch.zeros(3, 4, device="cuda"), torch.zeros(4)
    generator = torch.Generator()
    return {
        "operands": error_of(lambda: x + cpu),
        "linear": error_of(lambda: torch.nn.functional.linear(x, torch.zeros(2, 4))),
        "scalar": error_of(lambda: x + torch.tensor(1.0)),
        "numpy": error_of(x.numpy),
        "generator": error_of(lambda: torch.randn(2, device="cuda", generator=generator)),
        "ordinal": error_of(lambda: torch.zeros(2, device="cuda:2")),
        "devices": error_of(lambda: x + torch.zeros(4, device="cuda:1")),
    }


def scenario_graphs() -> dict:
    """A capture on the tensor's device, and one while another device is current."""
    found = {}
    for current in ("cuda:1", "cuda:0"):
        x = torch.zeros(2, device="cuda:1")
        graph = torch.cuda.CUDAGraph()
        with warnings.catch_warnings(record=True) as caught, torch.cuda.device(current):
            warnings.simplefilter("always")
            with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
                y = x + 1
                x.add_(1)
        before = host_copy(x).tolist()
        graph.replay()
        graph.replay()
        warned = any("CUDA Graph is empty" in str(warning.message) for warning in caught)
        found[current] = [before, host_copy(x).tolist(), host_copy(y).tolist(), warned]
    LOG.clear()
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin()
        found["item"] = error_of(x.max().item)
        found["end"] = error_of(graph.capture_end)
    return found
