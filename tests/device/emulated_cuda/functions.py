"""What torch does before it dispatches: tensors from Python's numbers, lists as indices, SDPA, `.data`."""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from . import graphs
from .log import LOG, place
from .tensor import CPU, CUDATensor, DeviceMismatchError, run, to_host, with_index

FROM_NUMBERS = (torch.tensor, torch.as_tensor, torch.asarray)
# each access makes a new object: compare with ==
GET_DATA, SET_DATA = torch.Tensor.data.__get__, torch.Tensor.data.__set__  # pyright: ignore
INDEX = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)


class Functions(TorchFunctionMode):
    """Functions that copy from the host without an operator, and those whose kernel depends on the device."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("generator") is not None:
            _check_generator(kwargs["generator"], args, kwargs)
        if func in FROM_NUMBERS and kwargs.get("device") is not None:
            if torch.device(kwargs["device"]).type == "cuda" and not isinstance(args[0], torch.Tensor):
                return _from_numbers(func, args, kwargs)
            if isinstance(args[0], torch.Tensor):
                return _from_tensor(func, args, kwargs)
        elif func is torch.Tensor.new_tensor and isinstance(args[0], CUDATensor):
            device = with_index(kwargs.get("device") or args[0].device)
            graphs.sync("host to device")
            value = torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype))
            return value if device == CPU else CUDATensor(value, device)
        elif func in INDEX and isinstance(args[0], CUDATensor):
            args = (args[0], _index(args[1], args[0].device), *args[2:])
        elif func is torch.nn.functional.scaled_dot_product_attention:
            return attention(*args, **kwargs)
        elif func == SET_DATA and any(isinstance(x, CUDATensor) for x in args):
            return set_data(*args)
        elif func == GET_DATA and isinstance(args[0], CUDATensor):
            return args[0].detach()
        elif func is torch.Tensor.__format__ and isinstance(args[0], CUDATensor):
            return CUDATensor.__format__(*args)
        return func(*args, **kwargs)


class Operators(TorchDispatchMode):
    """Every operator that reads tensors of the device, or makes one there."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operator imports torch's compiler, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if any(issubclass(t, CUDATensor) for t in types):
            return run(func, args, kwargs)
        if device is not None and torch.device(device).type == "cuda":
            return run(func, args, kwargs)
        return func(*args, **kwargs)


def _check_generator(generator: Any, args: tuple, kwargs: dict) -> None:
    """
    Raises:
        RuntimeError: a generator of another device than the tensor's, or one that the captured graph does not
            know.
    """
    tensor = args[0] if args and isinstance(args[0], torch.Tensor) else None
    device = CPU if tensor is None else tensor.device
    device = with_index(kwargs["device"]) if kwargs.get("device") is not None else device
    kind = "cuda" if getattr(generator, "emulated", False) else "cpu"
    if kind != device.type:
        raise RuntimeError(
            f"Expected a '{device.type}' device type for generator but found '{kind}' at {place()}"
        )
    graph = graphs.capture_on(device) if kind == "cuda" else None
    if graph is not None and not any(generator is known for known in graph.generators):
        graph.invalid = True
        raise RuntimeError("Attempt to increase offset for a CUDA generator not in capture mode.")


def _from_numbers(func: Any, args: tuple, kwargs: dict) -> torch.Tensor:
    device = with_index(kwargs["device"])
    value = func(*args, **{**kwargs, "device": CPU})
    if value.numel():  # of nothing, nothing is copied
        graphs.sync("host to device")
    return CUDATensor(value.detach(), device).requires_grad_(value.requires_grad)


def _from_tensor(func: Any, args: tuple, kwargs: dict) -> torch.Tensor:
    moved = args[0].to(with_index(kwargs["device"]), kwargs.get("dtype") or args[0].dtype)
    return moved.detach().clone() if func is torch.tensor else moved


def set_data(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """`tensor.data = value`, also for a value on another device: `tensor` remains the same object."""
    if value is tensor:
        return
    if tensor.device.type != value.device.type:  # torch allows that between CPU and CUDA, not from meta
        moved = value.detach()
        if isinstance(tensor, torch.nn.Parameter):
            moved = torch.nn.Parameter(moved, tensor.requires_grad)
            moved.__dict__.update({k: v for k, v in vars(tensor).items() if k not in ("host", "_device")})
        torch.utils.swap_tensors(tensor, moved)
        return
    with torch._C.DisableTorchFunction():
        tensor.data = value
    if isinstance(tensor, CUDATensor) and isinstance(value, CUDATensor):
        tensor.host, tensor._device = value.host.detach(), value._device


def apply_to_module(self: torch.nn.Module, fn: Callable[[Any], Any], recurse: bool = True) -> torch.nn.Module:
    """`nn.Module._apply`: as on a real device, parameters keep their identity."""
    for child in self.children() if recurse else ():
        child._apply(fn)
    for parameter in filter(lambda p: p is not None, self._parameters.values()):
        with torch.no_grad():
            set_data(parameter, fn(parameter))
            if parameter.grad is not None:
                set_data(parameter.grad, fn(parameter.grad))
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = fn(buffer)
    return self


def _index(index: Any, device: torch.device) -> Any:
    """A list as index becomes a tensor on the device."""
    parts = index if isinstance(index, tuple) else (index,)
    if not any(isinstance(part, (list, range)) for part in parts):
        return index
    graphs.sync("host to device (list index)")
    tensors = (CUDATensor(torch.tensor(p), device) if isinstance(p, (list, range)) else p for p in parts)
    return tuple(tensors)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """SDPA in fp32 inside; logs the kernel that CUDA would take."""
    if not isinstance(query, CUDATensor):
        with torch._C.DisableTorchFunction():
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
    operands = [x for x in (query, key, value, attn_mask) if x is not None]
    if len({x.device for x in operands}) > 1:
        raise DeviceMismatchError(f"scaled_dot_product_attention: operands on two devices at {place()}")
    if len({x.dtype for x in (query, key, value)}) > 1:
        raise RuntimeError(
            "Expected query, key, and value to have the same dtype, but got query.dtype: "
            f"{query.dtype}, key.dtype: {key.dtype}, and value.dtype: {value.dtype} at {place()}"
        )
    LOG.attention[_kernel(query, attn_mask), place()] += 1
    heads = query.shape[-3] // key.shape[-3] if enable_gqa else 1
    if heads > 1:
        key, value = key.repeat_interleave(heads, -3), value.repeat_interleave(heads, -3)
    with torch.autocast("cuda", enabled=False):
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        scores = (query.float() * factor) @ key.float().transpose(-1, -2)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None:
            masked = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if masked else scores + attn_mask
        weights = torch.dropout(scores.softmax(-1).nan_to_num(0.0), dropout_p, dropout_p > 0)
        return (weights @ value.float()).to(query.dtype)


def _kernel(query: torch.Tensor, mask: torch.Tensor | None) -> str:
    """The kernel that CUDA would take."""
    if query.shape[-1] % 8:
        return f"head size {query.shape[-1]} is no multiple of 8: padded or math"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return "mem_efficient (fp32)"
    return "flash" if mask is None and query.shape[-1] <= 256 else "mem_efficient (mask)"


def host_copy(x: torch.Tensor) -> torch.Tensor:
    """The numbers of a tensor, for assertions: counts no synchronisation."""
    return to_host(x).detach().clone()
