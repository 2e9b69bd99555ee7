"""Load the compiled native.cpp and mirror its structs.

Nothing is compiled at install time: without a compiler torch's operators are used.
"""

import ctypes
import functools
import os
from typing import Any

import torch
from torch import Tensor, nn

from open_unitok.core.processes import available_cores

from .int8 import Int8Linear
from .native_build import open_library

# Weight dtypes -> Matrix.dtype of the C++ code.
NATIVE_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64


def _struct(name: str, *fields: tuple[str, Any]) -> type[ctypes.Structure]:
    return type(
        name, (ctypes.Structure,), {"_fields_": [(f, kind) for names, kind in fields for f in names.split()]}
    )


# Mirror the structs of native.cpp and matmul.h: same fields, same order.
Matrix = _struct("Matrix", ("weight scale bias", _POINTER), ("outputs inputs dtype", _INT))
Norm = _struct("Norm", ("weight bias", _POINTER), ("eps", ctypes.c_double))
Layer = _struct(
    "Layer",
    ("attention_norm mlp_norm", Norm),
    ("query key value out gate up down", Matrix),
    ("keys values", _POINTER),
)
Stack = _struct(
    "Stack",
    ("layers", _POINTER),
    ("norm", Norm),
    ("cos sin", _POINTER),
    ("depth width heads kv_heads head_dim capacity", _INT),
)
Embedder = _struct(
    "Embedder",
    ("codebooks", _POINTER),
    ("attention_norm linear_norm mlp_norm gate_norm projector_norm", Norm),
    ("query key value out linear gate up down first second", Matrix),
    ("keys values places", _POINTER),
    ("books entries code_dim heads head_dim capacity attends_to_earlier sums_rows", _INT),
)


@functools.cache
def load_library() -> Any:
    """The compiled library; None if it cannot be built, or with `UNITOK_NATIVE=0`."""
    if os.environ.get("UNITOK_NATIVE") == "0":
        return None
    library = open_library()
    if library is None:
        return None
    for i, struct in enumerate((Matrix, Norm, Layer, Stack, Embedder)):
        # a struct whose layout differs from C++ would read wrong memory
        library.struct_size.restype = _INT
        assert library.struct_size(i) == ctypes.sizeof(struct), struct
    # without argtypes ctypes passes Python ints as 32 bits and truncates pointers
    library.decode_step.argtypes = [_POINTER] * 3 + [_INT] * 4 + [_POINTER] * 2 + [_INT]
    library.logits_step.argtypes = [_POINTER] * 2 + [_INT] * 2 + [_POINTER] * 4 + [_INT]
    return library


def num_threads() -> int:
    """torch's number of threads, at most the processors of this process.

    The threads of a step wait for each other by spinning: more of them than processors would wait for the
    scheduler instead.
    """
    return max(1, min(torch.get_num_threads(), available_cores()))


class StructBuilder:
    """Builds structs that point to tensors, and keeps these tensors alive."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def pointer(self, tensor: Tensor) -> int:
        """The address of a contiguous CPU tensor."""
        assert tensor.is_contiguous() and tensor.device.type == "cpu"
        self.kept.append(tensor)
        return tensor.data_ptr()

    def floats(self, tensor: Tensor | None) -> int | None:
        """The address of a tensor as float32; copies if the dtype or layout differs."""
        return None if tensor is None else self.pointer(tensor.detach().float().contiguous())

    def matrix(self, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Any:
        """A weight (outputs, inputs) in the model's memory; `scale` (outputs,) of int8 rows."""
        weight = weight.detach()
        sizes = (*weight.shape, NATIVE_DTYPES[weight.dtype])
        return Matrix(self.pointer(weight.contiguous()), self.floats(scale), self.floats(bias), *sizes)

    def linear(self, layer: nn.Linear | Int8Linear) -> Any:
        """The matrix of a linear layer."""
        return self.matrix(layer.weight, layer.bias, getattr(layer, "scale", None))

    def norm(self, layer: Any) -> Any:
        """The struct of an RMS norm or layer norm."""
        eps = getattr(layer, "variance_epsilon", None)  # LlamaRMSNorm; torch's norms have `eps`
        return Norm(
            self.floats(layer.weight),
            self.floats(getattr(layer, "bias", None)),
            layer.eps if eps is None else eps,
        )
