"""Autotuned operators for inference on CPU: the variants of an operator are timed at its first use.

Which variant is fastest depends on the processor: float32 products run twice as fast in oneDNN as in MKL on
some and slower on others; bfloat16 is the fastest format where the processor supports it and the slowest
where it does not. Therefore the first large product of each kind times every variant for some milliseconds,
and the choice holds until the process ends: the default, unless another takes less than `MAX_RELATIVE_TIME`
of its time (best of `NUM_ROUNDS` each, against noise). Variants differ only by rounding: codes differ only
where two entries are within 1e-4 of each other. Weights, state dicts and training do not change.
`UNITOK_FAST_CPU=0` turns autotuning off.
"""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_WORK = 2**22  # multiplications; for smaller products the dispatch costs more than it gains
MAX_RELATIVE_TIME = 0.9  # of the default's time; smaller gains are within the noise
NUM_ROUNDS = 5
_SAMPLE_ROWS, _SAMPLE_SIDE = 256, 8  # part of the input that is timed: rows of a matrix, side of a map
_chosen: dict[Any, str] = {}


def active(x: Tensor) -> bool:
    """Whether work on `x` is inference on CPU: no gradients, no autocast, no compilation."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and os.environ.get("UNITOK_FAST_CPU") != "0"
    )


def chosen() -> dict[Any, str]:
    """The choices so far: (operator, dtype, shape of the weight, threads) -> name of the variant."""
    return dict(_chosen)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`: (..., inputs), (outputs, inputs) -> (..., outputs)."""
    if not active(x) or x.dtype != weight.dtype or x.numel() * weight.shape[0] < MIN_WORK:
        return F.linear(x, weight, bias)
    variants = LINEAR_BFLOAT16 if x.dtype == torch.bfloat16 else LINEAR_FLOAT32
    sample = x.flatten(0, -2)[:_SAMPLE_ROWS]
    return _fastest("linear", variants, weight, (sample, weight, bias))(x, weight, bias)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """`F.conv2d`; bfloat16 maps may be computed in float32."""
    return _convolve("conv2d", CONV2D, x, weight, bias, options)


def conv_transpose2d(x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """`F.conv_transpose2d`; bfloat16 maps may be computed in float32."""
    return _convolve("conv_transpose2d", CONV_TRANSPOSE2D, x, weight, bias, options)


def gelu(map: Tensor) -> Tensor:
    """`F.gelu`, in place at inference: use it only on a map that nothing else reads. Bitwise equal.

    On large maps allocating the output takes longer than the arithmetic.
    """
    return torch.ops.aten.gelu_(map) if active(map) else F.gelu(map)


class DerivedWeight:
    """Caches a tensor derived from a weight until that weight changes.

    It is in no state dict; copies and pickles of the model leave it out.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._value: Tensor | None = None

    def get(self, weight: Tensor, derive: Callable[[Tensor], Tensor]) -> Tensor:
        """`derive(weight)`, or its cached result."""
        # Version and address do not change with in-place writes through `.data`, as some optimisers make;
        # sums over about 32 rows detect these.
        part = weight.detach()[:: max(weight.shape[0] // 32, 1)].float()
        version = 0 if weight.is_inference() else weight._version
        key = (weight.data_ptr(), version, weight.dtype, weight.shape, float(part.sum()), float(part.norm()))
        if self._value is None or key != self._key:
            self._key, self._value = key, derive(weight.detach())
        return self._value

    def clear(self) -> None:
        """Free the memory."""
        if self._value is not None:
            self._key = self._value = None

    def __reduce__(self) -> tuple[Any, ...]:
        return DerivedWeight, ()


def _convolve(
    name: str,
    variants: Mapping[str, Callable[..., Tensor]],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    # multiplications, up to a constant: strides, groups and padding are ignored
    work = x.shape[0] * x.shape[2] * x.shape[3] * weight.numel()
    # float32 convolutions have one variant only: there is nothing to choose
    if x.dtype != torch.bfloat16 or weight.dtype != x.dtype or not active(x) or work < MIN_WORK:
        return variants["torch"](x, weight, bias, **options)
    sample = x[:1, :, :_SAMPLE_SIDE, :_SAMPLE_SIDE].contiguous(memory_format=torch.channels_last)
    return _fastest(name, variants, weight, (sample, weight, bias), options)(x, weight, bias, **options)


def _fastest(
    name: str,
    variants: Mapping[str, Callable[..., Tensor]],
    weight: Tensor,
    sample: tuple[Any, ...],
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Tensor]:
    """The fastest variant for weights of this shape; the first of `variants` is the default."""
    # the number of threads is part of the key: variants scale differently with it
    key = (name, str(weight.dtype), tuple(weight.shape), torch.get_num_threads())
    if key not in _chosen:
        seconds = _measure(variants, sample, options or {})
        default, *others = seconds
        best = min(others, key=lambda variant: seconds[variant], default=default)
        _chosen[key] = best if seconds[best] < MAX_RELATIVE_TIME * seconds[default] else default
    return variants[_chosen[key]]


def _measure(
    variants: Mapping[str, Callable[..., Tensor]], sample: tuple[Any, ...], options: Mapping[str, Any]
) -> dict[str, float]:
    """Seconds of each variant that runs here: the best of `NUM_ROUNDS` interleaved runs after a warm-up.

    A variant that is 5 times slower than the best in the warm-up is not timed again.
    """
    # interleaved: a change of the machine's load affects all variants alike
    seconds: dict[str, float] = {}
    for round in range(1 + NUM_ROUNDS):
        for name, variant in variants.items():
            if round and (name not in seconds or seconds[name] > 5 * min(seconds.values())):
                continue
            start = time.perf_counter()
            try:
                variant(*sample, **options)
            except (RuntimeError, NotImplementedError, AttributeError):
                if name == next(iter(variants)):  # the default fails: the input is wrong
                    raise
                continue  # this build of torch or this processor does not have it
            took = time.perf_counter() - start
            # round 0 warms up and sorts out slow variants; round 1 replaces its time
            seconds[name] = took if round < 2 else min(seconds[name], took)
    return seconds


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _in_float32(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The operator computed in float32, for bfloat16 tensors."""

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
        return operator(
            x.float(), weight.float(), None if bias is None else bias.float(), **options
        ).bfloat16()

    return run


LINEAR_FLOAT32 = {"torch": F.linear, "onednn": _onednn}
LINEAR_BFLOAT16 = {"torch": F.linear, "float32": _in_float32(F.linear), "onednn": _onednn}
CONV2D = {"torch": F.conv2d, "float32": _in_float32(F.conv2d)}
CONV_TRANSPOSE2D = {"torch": F.conv_transpose2d, "float32": _in_float32(F.conv_transpose2d)}
