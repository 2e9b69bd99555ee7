"""A tensor that says it is on a CUDA device, and what each operator does with it."""

from collections.abc import Callable
from typing import Any

import torch

from . import graphs
from .kernels import KERNELS
from .log import LOG, place

CPU = torch.device("cpu")
# CUDA takes 0-d tensors of the CPU in pointwise operators, as it takes Python's numbers
SCALARS = {"where", "masked_fill", "masked_fill_", "fill_", "fill", "lerp", "lerp_", "clamp", "clamp_"}
SCALARS |= {"copysign", "_foreach_add_", "_foreach_mul_", "_foreach_mul", "_foreach_div_", "_fused_adamw_"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
# the sizes of their results depend on values, so the host waits
SIZE_FROM_VALUES = {"nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "bincount"}
CPU_ONLY = ("mkldnn", "onednn", "quantized")  # namespaces of operators without a CUDA kernel


class DeviceMismatchError(RuntimeError):
    """CUDA's error about operands on different devices."""


class _PlainTensor(type(torch.Tensor)):
    """Compares equal to the types of plain tensors: a tensor on a real device is of no type of its own."""

    def __eq__(cls, other: object) -> bool:
        return cls is other or other is torch.Tensor or other is torch.nn.Parameter

    def __hash__(cls) -> int:
        return id(cls)


class CUDATensor(torch.Tensor, metaclass=_PlainTensor):
    """`host` holds the numbers; shape, strides and dtype are those of `host`."""

    host: torch.Tensor
    _device: torch.device

    @staticmethod
    def __new__(cls, host: torch.Tensor, device: torch.device):
        assert not isinstance(host, CUDATensor) and device.index is not None, (type(host), device)
        with torch._C._DisableTorchDispatch():
            shell = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device="meta")
        self = torch.Tensor._make_subclass(
            cls, shell, False, dispatch_device=True, device_for_backend_keys=device
        )
        self.host, self._device = host, device
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:
        return self._device

    def get_device(self) -> int:
        return self._device.index

    def tolist(self) -> Any:
        graphs.sync("tolist")
        return self.host.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"can't convert {self._device} device type tensor to numpy. Use Tensor.cpu() to copy the "
            "tensor to host memory first."
        )

    __array__ = numpy

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def pin_memory(self, *args: Any) -> Any:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")

    def is_pinned(self, *args: Any) -> bool:
        return False

    def record_stream(self, stream: Any) -> None: ...

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"{self.host.detach()!r} on emulated {self._device}"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else repr(self)

    def __deepcopy__(self, memo: dict) -> Any:
        copy = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        # a file written here holds plain tensors; they are loaded on the CPU, as with map_location="cpu"
        host = self.host.detach()
        if isinstance(self, torch.nn.Parameter):
            host = torch.nn.Parameter(host, self.requires_grad)
        return host.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return run(func, args, kwargs or {})


def to_host(x: Any) -> Any:
    return x.host if isinstance(x, CUDATensor) else x


def map_tensors(function: Callable[[torch.Tensor], Any], x: Any) -> Any:
    """An argument or a result of an operator with `function` of each tensor; torch's pytree is slower."""
    if isinstance(x, torch.Tensor):
        return function(x)
    return type(x)(map_tensors(function, y) for y in x) if isinstance(x, (list, tuple)) else x


def with_index(device: Any) -> torch.device:
    """ "cuda" is the current device."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise RuntimeError("CUDA error: invalid device ordinal")
    return device


def run(func: Any, args: tuple, kwargs: dict) -> Any:
    """One ATen operator with operands on a CUDA device, or that makes a tensor there."""
    if func is torch.ops.prim.device.default:
        return args[0]._device
    name = func._overloadpacket.__name__
    if name == "_to_copy":
        return _to_copy(func, args, kwargs)
    if name == "copy_":
        return _copy_(func, args, kwargs)
    tensors = graphs.tensors_of((*args, *kwargs.values()))
    there = [x for x in tensors if isinstance(x, CUDATensor)]
    wanted = None if kwargs.get("device") is None else with_index(kwargs["device"])
    device = there[0]._device if there else wanted or CPU
    if there and name == "_local_scalar_dense":
        graphs.sync("item")
        return there[0].host.item()
    if there:
        _check_devices(func, name, args, tensors, device)
        _count_waits(func, name, args, kwargs)
    made_on = wanted or device
    args = tuple(map_tensors(to_host, x) for x in args)
    kwargs = {key: map_tensors(to_host, x) for key, x in kwargs.items()}
    if wanted is not None and wanted.type == "cuda":
        kwargs["device"] = CPU
    out = _launch(func, args, kwargs, device if there else made_on)
    if made_on.type != "cuda":  # the CPU, or meta
        return out
    known = {id(x.host): x for x in there}
    for x in there:
        if x.shape != x.host.shape:  # squeeze_ and the like changed `host` alone
            with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
                x.data = CUDATensor(x.host, x._device)
    return map_tensors(lambda x: known[id(x)] if id(x) in known else CUDATensor(x, made_on), out)


def _launch(func: Any, args: tuple, kwargs: dict, device: torch.device) -> Any:
    """Run on CPU tensors; recorded, if the device's current stream is captured."""
    LOG.operators += 1
    kernel = KERNELS.get(func._schema.name)
    graph = graphs.capture_on(device) if device.type == "cuda" else None
    if graph is None:
        return (kernel or func)(*args, **kwargs)
    written = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written += [x for x in (value if isinstance(value, (list, tuple)) else [value]) if x is not None]
    return graph.record(kernel or func, args, kwargs, written)


def _to_copy(func: Any, args: tuple, kwargs: dict) -> Any:
    source = args[0]
    goes = source.device if kwargs.get("device") is None else with_index(kwargs["device"])
    comes = source.device
    count_copy(source, goes, bool(kwargs.get("non_blocking")))
    if goes.type == "meta":
        return func(to_host(source), **kwargs)
    kwargs = {**kwargs, "device": None if kwargs.get("device") is None else CPU}
    if goes.type == "cpu":
        found = func(to_host(source), **kwargs)
        # torch makes pinned memory of what comes without waiting
        return found.pin_memory() if kwargs.get("non_blocking") and comes.type == "cuda" else found
    out = _launch(func, (to_host(source),), kwargs, goes)
    return CUDATensor(out, goes)


def _copy_(func: Any, args: tuple, kwargs: dict) -> Any:
    target, source, *flags = args
    non_blocking = bool(flags[0] if flags else kwargs.get("non_blocking"))
    if isinstance(target, CUDATensor) or isinstance(source, CUDATensor):
        count_copy(source, target.device, non_blocking, target)
    device = target.device if target.device.type == "cuda" else source.device
    _launch(func, (to_host(target), to_host(source)), {}, device)
    return target


def count_copy(
    source: torch.Tensor, goes: torch.device, non_blocking: bool, target: torch.Tensor | None = None
) -> None:
    """A copy between host and device waits, unless it is non_blocking and the host's memory is pinned."""
    comes = source.device.type
    if not source.numel() or comes == goes.type or goes.type == "meta":
        return
    host = source if comes == "cpu" else target
    pinned = host is None or host.is_pinned()  # None: `_to_copy` pins its result
    if not (non_blocking and pinned):
        kind = "host to device" if comes == "cpu" else "device to host"
        graphs.sync(f"{kind} (not pinned)" if non_blocking else kind)


def _check_devices(func: Any, name: str, args: tuple, tensors: list, device: torch.device) -> None:
    """
    Raises:
        DeviceMismatchError: operands on different devices that CUDA would not take together.
    """
    if func.namespace in CPU_ONLY or name.startswith("mkldnn"):
        raise NotImplementedError(f"Could not run '{func}' with arguments from the 'CUDA' backend.")
    others = [x for x in tensors if x.device != device]
    if not others:
        return
    if name in INDEXING:
        if not isinstance(args[0], CUDATensor):
            raise DeviceMismatchError(
                "indices should be either on cpu or on the same device as the indexed tensor (cpu) at "
                f"{place()}"
            )
        for x in others:
            if any(x is index for index in args[1]) and x.device == CPU:
                graphs.sync("host to device (index)")
            elif x.dim() or x.device != CPU:
                raise DeviceMismatchError(f"expected self and value to be on the same device ({place()})")
        return
    scalars = torch.Tag.pointwise in func.tags or name in SCALARS
    for x in others:
        if not (x.dim() == 0 and x.device == CPU and scalars):
            raise DeviceMismatchError(
                f"Expected all tensors to be on the same device, but found at least two devices, {device} "
                f"and {x.device}! (in {func}, tensor of shape {tuple(x.shape)}, at {place()})"
            )


def _count_waits(func: Any, name: str, args: tuple, kwargs: dict) -> None:
    """Count what makes the host wait for values on the device."""
    if name in SIZE_FROM_VALUES or name == "equal":
        graphs.sync(name)
    if name == "repeat_interleave" and "self_int" not in str(func) and kwargs.get("output_size") is None:
        graphs.sync(name)
    if name in INDEXING:
        masks = [i for i in args[1] if isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8)]
        value = args[2] if len(args) > 2 else None
        # x[mask] = 0-d value is masked_fill
        if masks and not (isinstance(value, torch.Tensor) and value.dim() == 0 and len(args[1]) == 1):
            graphs.sync("bool mask index")
