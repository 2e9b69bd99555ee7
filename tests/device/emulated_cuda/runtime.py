"""torch.cuda of the emulated device: devices, streams, random state, memory."""

import contextlib
import ctypes
import os
import threading
import types
from typing import Any

import torch
import torch.utils._triton

from . import graphs
from .functions import Functions, Operators, apply_to_module
from .log import LOG

NAME = "Emulated CUDA device"
MEMORY = 80 * 2**30  # bytes
MEMORY_COUNTERS = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
NO_EFFECT = ("empty_cache", "reset_peak_memory_stats", "_lazy_init", "init", "ipc_collect", "manual_seed")
NO_EFFECT += ("set_per_process_memory_fraction", "manual_seed_all")
NO_EFFECT += ("reset_accumulated_memory_stats",)


class Generator(torch.Generator):
    """A generator that knows its device; the numbers are the CPU's."""

    def __new__(cls, device: Any = "cpu"):
        self = super().__new__(cls, device="cpu")
        self.emulated = torch.device(device).type == "cuda"
        self._device = torch.device("cpu")
        if self.emulated:
            self._device = torch.device("cuda", torch.device(device).index or 0)
        return self

    @property
    def device(self) -> torch.device:
        return self._device


def install() -> None:
    """Give this process CUDA devices, for good. Every thread that Python starts has them too."""
    library = ctypes.CDLL(os.environ["EMULATED_CUDA_GUARD"])
    _patch_cuda(library.emulated_cuda_exchange_device)
    torch.Generator = Generator  # type: ignore[misc]
    torch.nn.Module._apply = apply_to_module  # type: ignore[method-assign]
    torch.inference_mode = _inference_mode  # type: ignore[misc,assignment]
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    _patch_compile()
    _patch_nccl()
    _patch_threads()
    functions = Functions()
    run_backward = torch.autograd._engine_run_backward

    def backward(*args: Any, **kwargs: Any) -> Any:  # torch leaves the mode before the backward pass
        with functions:
            return run_backward(*args, **kwargs)

    torch.autograd._engine_run_backward = backward
    for module in (torch.autograd.graph, torch.autograd):
        if hasattr(module, "_engine_run_backward"):
            module._engine_run_backward = backward
    Operators().__enter__()
    functions.__enter__()


def _inference_mode(mode: Any = True) -> Any:
    """no_grad: a tensor subclass has no version counter in inference mode."""
    if callable(mode):
        return torch.no_grad(mode)
    return torch.no_grad() if mode else contextlib.nullcontext()


def _constant(value: Any) -> Any:
    return lambda *args, **kwargs: value


def _patch_cuda(exchange: Any) -> None:
    """Replace what a build without CUDA lacks; contexts such as torch.cuda.graph stay torch's own."""
    count = int(os.environ["EMULATED_CUDA_DEVICES"])

    def set_device(device: Any) -> None:
        index = torch.cuda._utils._get_device_index(device)
        if index >= count:
            raise RuntimeError("CUDA error: invalid device ordinal")
        exchange(index)

    def properties(device: Any = None) -> Any:
        return types.SimpleNamespace(
            name=NAME,
            major=9,
            minor=0,
            total_memory=MEMORY,
            multi_processor_count=132,
            L2_cache_size=50 * 2**20,
            gcnArchName="",
            max_threads_per_multi_processor=2048,
            warp_size=32,
        )

    changes = {
        "is_available": lambda: True,
        "device_count": lambda: count,
        "current_device": lambda: exchange(-1),
        "_exchange_device": lambda index: exchange(index),
        "_maybe_exchange_device": lambda index: exchange(index),
        "set_device": set_device,
        "synchronize": lambda device=None: graphs.sync("synchronize"),
        "get_device_properties": properties,
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: (9, 0),
        "get_arch_list": lambda: ["sm_90"],
        "is_bf16_supported": lambda *args, **kwargs: True,
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "memory_stats": lambda device=None: {},
        # a function for each name: torch's compiler forbids two names of one function
        **{name: _constant(0) for name in MEMORY_COUNTERS},
        **{name: _constant(None) for name in NO_EFFECT},
        "is_initialized": lambda: True,
        # one random state for host and devices
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "get_rng_state_all": lambda: [torch.get_rng_state()] * count,
        "set_rng_state_all": lambda states: torch.set_rng_state(states[0]),
        "Stream": graphs.Stream,
        "Event": graphs.Event,
        "CUDAGraph": graphs.CUDAGraph,
        "current_stream": graphs.current_stream,
        "default_stream": graphs.default_stream,
        "set_stream": graphs.set_stream,
        "graph_pool_handle": graphs.graph_pool_handle,
        "is_current_stream_capturing": graphs.is_current_stream_capturing,
    }
    for name, value in changes.items():
        setattr(torch.cuda, name, value)
    torch.cuda.graphs.is_current_stream_capturing = graphs.is_current_stream_capturing
    for module in (torch.cuda.memory, torch.cuda.random, torch.cuda.graphs, torch.cuda.streams):
        for name in changes:
            if hasattr(module, name):
                setattr(module, name, changes[name])
    torch._C._cuda_set_sync_debug_mode = graphs.set_sync_debug_mode  # type: ignore[attr-defined]
    torch._C._host_emptyCache = _constant(None)  # type: ignore[attr-defined]
    torch.cuda.nvtx._nvtx = types.SimpleNamespace(  # type: ignore[attr-defined]
        rangePushA=_constant(0), rangePop=_constant(0), markA=_constant(0)
    )
    torch.version.cuda = "13.0"


def _patch_compile() -> None:
    """torch.compile returns its argument: nothing can be compiled for the device."""

    def compile(model: Any = None, **kwargs: Any) -> Any:
        if model is None:
            return lambda model: compile(model)
        LOG.compiled += 1
        return model

    def compile_module(self: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        LOG.compiled += 1

    torch.utils._triton.has_triton = lambda: True  # what would compile
    torch.compile = compile  # type: ignore[assignment]
    torch.nn.Module.compile = compile_module  # type: ignore[method-assign]


def _patch_nccl() -> None:
    """gloo in the place of NCCL: operators of torch.distributed get the CPU's tensors, like all others."""
    init_process_group = torch.distributed.init_process_group

    def init(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        init_process_group("gloo" if backend and "nccl" in backend else backend, *args, **kwargs)

    torch.distributed.init_process_group = init
    torch.distributed.is_nccl_available = lambda: True


def _patch_threads() -> None:
    """Modes are per thread: enter them in every new one."""
    bootstrap = threading.Thread._bootstrap_inner  # type: ignore[attr-defined]

    def with_modes(self: threading.Thread) -> None:
        with Operators(), Functions():
            bootstrap(self)

    threading.Thread._bootstrap_inner = with_modes  # type: ignore[attr-defined]
