"""Operators for inference on CPU, chosen by a fixed rule per processor.

Which operator is fastest depends on the processor: float32 products run up to twice as fast in oneDNN as in
MKL on AMD's, and slower on Intel's; bfloat16 is the fastest format where the processor multiplies it and the
slowest where it does not. The rule reads the processor's name and features alone: operators differ by
rounding, so a choice by timing would change codes between two runs on one machine. Weights, state dicts and
training do not change. `UNITOK_FAST_CPU=0` restores torch's default operators.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_WORK = 2**22  # multiplications; for smaller products the dispatch costs more than it gains


@functools.cache
def float32_operator() -> str:
    """The operator of float32 products, a key of `LINEAR_FLOAT32`."""
    return "onednn" if _vendor() == "AuthenticAMD" and torch.backends.mkldnn.is_available() else "torch"


@functools.cache
def bfloat16_operator() -> str:
    """The operator of bfloat16 products and convolutions: "torch", or "float32" where they are emulated."""
    # outside x86 (no vendor) torch's own choice stays
    multiplies = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "torch" if multiplies or _vendor() is None else "float32"


def _vendor() -> str | None:
    """The vendor of an x86 processor under Linux, else None."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), None)


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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`: (..., inputs), (outputs, inputs) -> (..., outputs)."""
    fits = x.dtype == weight.dtype and x.shape[-1] == weight.shape[1]  # else torch has the clearer error
    if not fits or not active(x) or x.numel() * weight.shape[0] < MIN_WORK:
        return F.linear(x, weight, bias)
    if x.dtype == torch.bfloat16:
        return LINEAR_BFLOAT16[bfloat16_operator()](x, weight, bias)
    return LINEAR_FLOAT32[float32_operator()](x, weight, bias)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """`F.conv2d`; bfloat16 maps may be computed in float32."""
    return _convolve(F.conv2d, x, weight, bias, options)


def conv_transpose2d(x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """`F.conv_transpose2d`; bfloat16 maps may be computed in float32."""
    return _convolve(F.conv_transpose2d, x, weight, bias, options)


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
    operator: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, options: dict[str, Any]
) -> Tensor:
    # multiplications, up to a constant: strides, groups and padding are ignored
    work = x.shape[0] * x.shape[2] * x.shape[3] * weight.numel()
    # float32 convolutions have one operator only: there is nothing to choose
    applies = x.dtype == torch.bfloat16 == weight.dtype and active(x) and work >= MIN_WORK
    if applies and bfloat16_operator() == "float32":
        operator = _in_float32(operator)
    return operator(x, weight, bias, **options)


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
LINEAR_BFLOAT16 = {"torch": F.linear, "float32": _in_float32(F.linear)}
