"""The C++ steps of `native.cpp`, compiled once per machine with the compiler there is, and their structs.

Nothing is compiled at install: where there is no compiler, drawing takes torch's operators instead.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SOURCE = Path(__file__).with_name("native.cpp")
SOURCES = (SOURCE, SOURCE.with_name("matmul.h"))
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread")
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_log = logging.getLogger(__name__)


def _struct(name: str, *fields: tuple[str, Any]) -> type[ctypes.Structure]:
    return type(
        name, (ctypes.Structure,), {"_fields_": [(f, kind) for names, kind in fields for f in names.split()]}
    )


Matrix = _struct("Matrix", ("weight scale bias", _POINTER), ("outputs inputs kind", _INT))
Norm = _struct("Norm", ("weight bias", _POINTER), ("eps", ctypes.c_double))
Layer = _struct(
    "Layer", ("norm1 norm2", Norm), ("query key value out gate up down", Matrix), ("keys values", _POINTER)
)
Stack = _struct(
    "Stack",
    ("layers", _POINTER),
    ("norm", Norm),
    ("cos sin", _POINTER),
    ("depth width heads kv_heads head room", _INT),
)
Embedder = _struct(
    "Embedder",
    ("codebooks", _POINTER),
    ("attention_norm linear_norm mlp_norm gate_norm projector_norm", Norm),
    ("query key value out linear gate up down first second", Matrix),
    ("keys values", _POINTER),
    ("books entries code heads head room context", _INT),
)


@functools.cache
def library() -> Any:
    """The compiled steps, or None where they cannot be had; `UNITOK_NATIVE=0` turns them off."""
    if os.environ.get("UNITOK_NATIVE") == "0":
        return None
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
    try:
        path = _build(compiler)
        steps = ctypes.CDLL(str(path)) if path else None
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        _log.warning("The C++ steps could not be built, torch's operators draw instead: %s", detail[-300:])
        return None
    if steps is None:
        _log.info("There is no C++ compiler: torch's operators draw, which takes several times as long.")
        return None
    for i, struct in enumerate((Matrix, Norm, Layer, Stack, Embedder)):
        steps.sizes.restype = _INT
        assert steps.sizes(i) == ctypes.sizeof(struct), struct
    steps.decoder_step.argtypes = [_POINTER] * 3 + [_INT] * 4 + [_POINTER] * 2 + [_INT]
    steps.logits_step.argtypes = [_POINTER] * 2 + [_INT] * 2 + [_POINTER] * 4 + [_INT]
    return steps


def _build(compiler: str | None) -> Path | None:
    """The library in the user's cache, named by all that decides its content."""
    key = hashlib.sha256(
        b"".join(path.read_bytes() for path in SOURCES) + " ".join(FLAGS).encode() + _processor().encode()
    ).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "open-unitok"
    path = folder / f"native-{key[:16]}.so"
    if path.exists() or compiler is None:
        return path if path.exists() else None
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:  # renamed whole, so that processes may race
        made = Path(work) / path.name
        command = [compiler, *FLAGS, "-o", str(made), str(SOURCE)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        made.replace(path)
    return path


def _processor() -> str:
    """What `-march=native` depends on: a home folder may be shared by unlike machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.system()} {platform.machine()} {platform.processor()} {flags}"


class Keeper:
    """Makes structs that point into tensors, and keeps these tensors alive."""

    def __init__(self, int8: bool = False):
        self.int8, self.kept = int8, []

    def pointer(self, tensor: Tensor) -> int:
        """The address of a contiguous tensor."""
        assert tensor.is_contiguous() and tensor.device.type == "cpu"
        self.kept.append(tensor)
        return tensor.data_ptr()

    def floats(self, tensor: Tensor | None) -> int | None:
        """The address of a float32 tensor, a copy where need be."""
        return None if tensor is None else self.pointer(tensor.detach().float().contiguous())

    def matrix(self, weight: Tensor, bias: Tensor | None = None) -> Any:
        """Of a weight (outputs, inputs): the model's own memory, or an int8 copy."""
        scale = None
        weight = weight.detach()
        if self.int8:
            scale = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127
            weight = (weight.float() / scale[:, None]).round().to(torch.int8)
        sizes = (*weight.shape, KINDS[weight.dtype])
        return Matrix(self.pointer(weight.contiguous()), self.floats(scale), self.floats(bias), *sizes)

    def linear(self, layer: nn.Linear) -> Any:
        """Of a linear layer."""
        return self.matrix(layer.weight, layer.bias)

    def norm(self, layer: Any) -> Any:
        """Of an RMS or layer norm."""
        eps = getattr(layer, "variance_epsilon", None)
        return Norm(
            self.floats(layer.weight),
            self.floats(getattr(layer, "bias", None)),
            layer.eps if eps is None else eps,
        )
