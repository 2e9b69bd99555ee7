"""Devices and dtypes by name, each refused with what this machine has instead."""

from pathlib import Path

import torch

from .errors import UserError


def check_device(device: str | torch.device) -> torch.device:
    """
    Raises:
        UserError: there is no such device here.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device is {device!r}; it must be cpu, cuda, cuda:N or mps.") from error
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(found.type) or (
        found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count()
    ):
        here = [name for name, is_there in there.items() if is_there]
        raise UserError(f"device is {device!r}, which this machine does not have; it has: {', '.join(here)}.")
    return found


ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def check_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """The dtype meant; UserError if there is none of this name."""
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = getattr(torch, ALIASES.get(dtype, dtype), None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"dtype is {dtype!r}; it must be float32, bfloat16 or float16.")
    return found


def bf16_in_hardware() -> bool:
    """True where bf16 is faster than fp32, not emulated."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    path = Path("/proc/cpuinfo")
    return path.exists() and bool({"avx512_bf16", "amx_bf16"} & set(path.read_text().split()))
