"""Faster operators for inference on a CPU, each chosen by a measurement on this machine at its first use.

What is fast depends on the processor: float32 products run twice as fast in oneDNN as in MKL on some, and
slower on others; bfloat16 is the fastest format where the processor knows it, and the slowest where it does
not. So the first large product of each kind is timed in every way there is, for some milliseconds, and one
way stays until the process ends: the usual one, unless another takes less than `MARGIN` of its time, best of
`TURNS` each, so that a moment of noise does not choose. All ways give the same results but for rounding:
codes differ between them only where two entries are as near to within 1e-4. Nothing is packed or replaced:
weights, state dicts and training are as without this module. `UNITOK_FAST_CPU=0` turns it off.
"""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LARGE = 2**22  # multiplications; for fewer, asking costs more than it gains
MARGIN = 0.9  # a way must take less than this share of the usual one's time, or chance would choose
TURNS = 5
ROWS, SIDE = 256, 8  # the part of the input that is timed: rows of a matrix, sides of a map
_chosen: dict[Any, str] = {}


def active(x: Tensor) -> bool:
    """Whether work on `x` is inference on a CPU: no gradients, no autocast, not being compiled."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and os.environ.get("UNITOK_FAST_CPU") != "0"
    )


def chosen() -> dict[Any, str]:
    """What was measured so far: (operator, dtype, shape of the weight, threads) -> name of the fastest."""
    return dict(_chosen)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`: (..., inputs), (outputs, inputs) -> (..., outputs)."""
    if not active(x) or x.dtype != weight.dtype or x.numel() * weight.shape[0] < LARGE:
        return F.linear(x, weight, bias)
    ways = LINEAR_BFLOAT16 if x.dtype == torch.bfloat16 else LINEAR_FLOAT32
    sample = x.flatten(0, -2)[:ROWS]
    return _fastest("linear", ways, weight, (sample, weight, bias))(x, weight, bias)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """`F.conv2d`; bfloat16 maps may take the way through float32."""
    return _convolve("conv2d", CONV2D, x, weight, bias, options)


def conv_transpose2d(x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """`F.conv_transpose2d`; bfloat16 maps may take the way through float32."""
    return _convolve("conv_transpose2d", CONV_TRANSPOSE2D, x, weight, bias, options)


def gelu(map: Tensor) -> Tensor:
    """`F.gelu` of a map that nothing else needs, in its own memory: being given as much again by the system
    takes longer than the arithmetic where the map is large. Bit for bit the same."""
    return torch.ops.aten.gelu_(map) if active(map) else F.gelu(map)


class Kept:
    """A tensor that is made from a weight, kept as long as that weight stays what it was.

    It belongs to no state dict; copies and pickles of the model leave it behind.
    """

    def __init__(self) -> None:
        self._of: Any = None
        self._made: Tensor | None = None

    def get(self, weight: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """`make(weight)`, or what it gave last time."""
        # Version and address miss what `.data` writes in place, which some optimisers do: hence the sums.
        some = weight.detach()[:: max(weight.shape[0] // 32, 1)].float()
        version = 0 if weight.is_inference() else weight._version
        of = (weight.data_ptr(), version, weight.dtype, weight.shape, float(some.sum()), float(some.norm()))
        if self._made is None or of != self._of:
            self._of, self._made = of, make(weight.detach())
        return self._made

    def drop(self) -> None:
        """Free the memory."""
        if self._made is not None:
            self._of = self._made = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, ()


def _convolve(
    name: str,
    ways: Mapping[str, Callable[..., Tensor]],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    work = x.shape[0] * x.shape[2] * x.shape[3] * weight.numel()
    if x.dtype != torch.bfloat16 or weight.dtype != x.dtype or not active(x) or work < LARGE:
        return ways["torch"](x, weight, bias, **options)
    sample = x[:1, :, :SIDE, :SIDE].contiguous(memory_format=torch.channels_last)
    return _fastest(name, ways, weight, (sample, weight, bias), options)(x, weight, bias, **options)


def _fastest(
    name: str,
    ways: Mapping[str, Callable[..., Tensor]],
    weight: Tensor,
    sample: tuple[Any, ...],
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Tensor]:
    """The fastest way for weights of this shape; the first of `ways` is the usual one."""
    key = (name, str(weight.dtype), tuple(weight.shape), torch.get_num_threads())
    if key not in _chosen:
        seconds = _measure(ways, sample, options or {})
        usual, *others = seconds
        best = min(others, key=lambda way: seconds[way], default=usual)
        _chosen[key] = best if seconds[best] < MARGIN * seconds[usual] else usual
    return ways[_chosen[key]]


def _measure(
    ways: Mapping[str, Callable[..., Tensor]], sample: tuple[Any, ...], options: Mapping[str, Any]
) -> dict[str, float]:
    """Seconds of each way that runs here: the best of `TURNS`, in turns, after one to warm up.

    A way that is far behind after its first turn gets no other.
    """
    seconds: dict[str, float] = {}
    for turn in range(1 + TURNS):
        for name, way in ways.items():
            if turn and (name not in seconds or seconds[name] > 5 * min(seconds.values())):
                continue
            start = time.perf_counter()
            try:
                way(*sample, **options)
            except (RuntimeError, NotImplementedError, AttributeError):
                if name == next(iter(ways)):
                    raise
                continue  # this build of torch, or this processor, does not have it
            took = time.perf_counter() - start
            seconds[name] = took if turn < 2 else min(seconds[name], took)
    return seconds


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _through_float32(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The operator in float32, for bfloat16 tensors."""

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
        return operator(
            x.float(), weight.float(), None if bias is None else bias.float(), **options
        ).bfloat16()

    return run


LINEAR_FLOAT32 = {"torch": F.linear, "onednn": _onednn}
LINEAR_BFLOAT16 = {"torch": F.linear, "float32": _through_float32(F.linear), "onednn": _onednn}
CONV2D = {"torch": F.conv2d, "float32": _through_float32(F.conv2d)}
CONV_TRANSPOSE2D = {"torch": F.conv_transpose2d, "float32": _through_float32(F.conv_transpose2d)}
