"""Parse device and dtype names, check that this machine supports them, and make a GPU the current one."""

import contextlib
import os
import platform
from pathlib import Path
from typing import Any

import torch

from .errors import UserError

_ISA_WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"}
_DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def check_device(device: str | torch.device) -> torch.device:
    """Parse a device name.

    Raises:
        UserError: not a valid device name, or this machine has no such device.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"device is {device!r}; it must be cpu, cuda, cuda:N or mps.") from error
    # torch.device("cuda") is valid even in a build without CUDA
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(found.type) or (
        found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count()
    ):
        here = ", ".join(name for name, is_available in available.items() if is_available)
        raise UserError(f"device is {device!r}, which this machine does not have; available: {here}.")
    return found


def set_device(device: str | torch.device) -> torch.device:
    """Parse a device name and make it this thread's current CUDA device.

    Every entry point calls this before it loads a model, and every thread before it runs one: a new thread
    starts on cuda:0, and streams, graphs and libraries that are given no device take the current one.

    Raises:
        UserError: as `check_device`.
    """
    found = check_device(device)
    if found.type == "cuda" and found.index is not None:  # "cuda" is the current device, whichever it is
        torch.cuda.set_device(found)
    return found


def current_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Context manager: `device` is this thread's current CUDA device; nothing on other devices."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def check_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """Parse a dtype name; None = bfloat16 on CUDA, float32 elsewhere.

    Raises:
        UserError: not float32, bfloat16 or float16.
    """
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = getattr(torch, _DTYPE_ALIASES.get(dtype, dtype), None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"dtype is {dtype!r}; it must be float32, bfloat16 or float16.")
    return found


def processor_name() -> str:
    """Name, family and model of the processor, with the vector instructions that torch uses.

    Virtual machines often hide the product name, and the same name comes with and without AVX-512.
    """
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name", platform.processor() or platform.machine())
    model = f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"
    return f"{name} {model} {torch.backends.cpu.get_cpu_capability()}"


def fast_bf16() -> bool:
    """True if this machine multiplies matrices faster in bf16 than in fp32.

    On a CPU that takes AMX, or AMD's AVX-512 with bf16. An Intel core without AMX (which virtual machines may
    hide) takes 1.8 times as long in bf16 (85 against 155 GFLOP/s, measured on one of family 6, model 207).
    """
    # training uses the GPU if there is one
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    # oneDNN, which runs bf16 products on a CPU, may be told to use fewer instructions
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    if limit in _ISA_WITHOUT_BF16:
        return False
    # x86 flags; other CPUs and systems without /proc count as slow
    path = Path("/proc/cpuinfo")
    words = set(path.read_text().split()) if path.exists() else set()
    amx = "amx_bf16" in words and (limit in ("DEFAULT", "ALL") or "AMX" in limit)
    return amx or {"avx512_bf16", "AuthenticAMD"} <= words
