"""Models on several ranks of a node: rank 0 builds one, the others get its values on their devices.

Every rank of a node shares the host's memory, and a model of 7 G parameters is 28 GB there. The other ranks
build the same modules without memory for parameters (on torch's meta device); rank 0's values arrive by
broadcast, at ZeRO 3 one parameter at a time.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from open_unitok.core import distributed
from open_unitok.core.errors import UserError

_CHUNK = 2**20  # elements, a multiple of the 16 that torch's `normal_` samples at a time


def build_on_main(build: Callable[[], Any], kind: type) -> Any:
    """The model of `build`, called on rank 0 alone; on the others a `kind` of the same config, on meta.

    `materialise` or `deepspeed_engine.shard_to_device` gives it rank 0's values. Call it on every rank.

    Raises:
        UserError: on every rank, if `build` raises one on rank 0.
    """
    if distributed.world_size() == 1:
        return build()
    model, facts, failure = None, None, None
    if distributed.is_main():
        try:
            model = build()
            facts = {"config": model.config.to_dict(), "parameters": _parameter_facts(model)}
        except UserError as error:  # the others must not wait for a model
            facts, failure = {"error": str(error)}, error
    sent: list[Any] = [facts]
    dist.broadcast_object_list(sent, device=torch.device("cpu"))
    if failure is not None:
        raise failure
    if "error" in sent[0]:
        raise UserError(sent[0]["error"])
    if model is None:
        with parameters_on_meta():
            model = kind(kind.config_class.from_dict(sent[0]["config"]))  # pyright: ignore
        for (_, _, trained), parameter in zip(sent[0]["parameters"], model.parameters()):
            parameter.requires_grad_(trained)
    # else the broadcasts of the values would hang, or mix parameters up
    assert _parameter_facts(model) == sent[0]["parameters"], "ranks built different models"
    return model


def materialise(module: nn.Module, device: torch.device) -> None:
    """Move a model of `build_on_main` to its device, with the values of rank 0; ZeRO 0 to 2."""
    for parameter in module.parameters():
        _allocate(parameter, device)
    module.to(device)
    if distributed.world_size() == 1:
        return
    for tensor in (*module.parameters(), *module.buffers()):
        _broadcast(tensor.data)


def share_buffers(module: nn.Module) -> None:
    """Give every rank the buffers of rank 0, which DeepSpeed does not send."""
    for buffer in module.buffers() if distributed.world_size() > 1 else ():
        _broadcast(buffer)


@contextlib.contextmanager
def allocated_on_demand(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Within, `module.parameters()` gives a parameter on meta memory on `device` when it comes to it."""
    original = module.parameters

    def parameters(*args: Any, **kwargs: Any) -> Iterator[nn.Parameter]:
        for parameter in original(*args, **kwargs):
            _allocate(parameter, device)
            yield parameter

    module.parameters = parameters
    try:
        yield
    finally:
        del module.parameters


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Within, new modules have their parameters on meta; buffers are as always."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        # a tied parameter, which is registered a second time, stays one object
        if param is not None and not param.is_meta:
            empty = nn.Parameter(param.detach().to("meta"), param.requires_grad)
            vars(empty).update(vars(param))
            param = empty
        original(self, name, param)

    nn.Module.register_parameter = register
    try:
        yield
    finally:
        nn.Module.register_parameter = original


class SampleWithoutStoring(TorchDispatchMode):
    """Within, random numbers for tensors on meta are sampled and dropped: torch's generator advances as if
    the tensors had memory, so what is initialised after them gets the same numbers.

    That holds for `normal_` and `uniform_`, which decoders use; torch's `trunc_normal_` skips meta tensors.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args and isinstance(args[0], Tensor) else None
        if target is None or not target.is_meta or torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        left = target.numel()
        while left >= 2 * _CHUNK and func.overloadpacket in (torch.ops.aten.normal_, torch.ops.aten.uniform_):
            func(torch.empty(_CHUNK, dtype=target.dtype), *args[1:], **kwargs)
            left -= _CHUNK
        # at least a chunk, if there was one: `normal_` samples fewer than 16 in another way
        func(torch.empty(left, dtype=target.dtype), *args[1:], **kwargs)
        return target


def _parameter_facts(model: nn.Module) -> list[tuple[str, tuple[int, ...], bool]]:
    return [(name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()]


def _allocate(parameter: nn.Parameter, device: torch.device) -> None:
    """Give a parameter on meta memory; it stays the same object, which optimizer groups hold."""
    if parameter.is_meta:
        empty = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
        vars(empty).update(vars(parameter))
        torch.utils.swap_tensors(parameter, empty)


@torch.no_grad()
def _broadcast(tensor: Tensor) -> None:
    # as bytes: gloo has no booleans; a copy where the memory is in another order, as channels_last
    flat = tensor.contiguous().reshape(-1)
    dist.broadcast(flat.view(torch.uint8), 0)
    tensor.copy_(flat.view(tensor.shape))
