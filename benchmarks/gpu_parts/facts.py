"""Facts: the machine, its packages, and the rates that floors and MFU refer to."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from typing import Any

import torch
from harness import best_seconds, processor_name

from open_unitok.doctor import importable
from open_unitok.training.core.flops import peak_tflops

from .report import GIB, Report

_PACKAGES = ("transformers", "deepspeed", "accelerate", "peft", "numpy", "pillow", "triton", "pytest")
_SMI = "name,driver_version,memory.total,memory.used,pstate,clocks.max.sm,power.limit"


def run(report: Report) -> None:
    """Rows "software", "hardware", "rates"."""
    report.row("software", software)
    report.row("hardware", hardware, report)
    report.row("rates", rates, report)


def software() -> dict[str, Any]:
    """Versions, and what is optional here."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    found |= {
        "cuda": torch.version.cuda,
        "flash_attn": importable("flash_attn"),
        "nvcc": shutil.which("nvcc"),
    }
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def hardware(report: Report) -> dict[str, Any]:
    """Device, driver and free memory, host cores and memory."""
    found: dict[str, Any] = {"processor": processor_name(), "cores": len(os.sched_getaffinity(0))}
    found["host_memory_gib"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={_SMI}", "--format=csv"]
        smi = subprocess.run(command, capture_output=True, text=True, timeout=20)
        found["nvidia_smi"] = (smi.stdout or smi.stderr).strip().splitlines()
    if report.device == "cuda":
        found["devices"] = torch.cuda.device_count()
        found["capability"] = list(torch.cuda.get_device_capability())
        found["bf16"] = torch.cuda.is_bf16_supported()
        found["peak_tflops"] = peak_tflops(torch.device("cuda"))
        # an emulated device has no memory to ask for
        free, total = (0, 0) if report.toy else torch.cuda.mem_get_info()
        found |= report.measured(free_gib=free / GIB, total_gib=total / GIB)
    return found


def rates(report: Report) -> dict[str, Any]:
    """bf16 TFLOP/s of a product of 8192 x 8192, and GB/s of reading, copying and uploading."""
    side, size = (64, 2**16) if report.toy else (8192, 2**31)
    device = report.device
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = best_seconds(lambda: a @ b, 10, device)
    numbers = torch.ones(size // 4, device=device)
    other = torch.empty_like(numbers)
    read = best_seconds(numbers.sum, 10, device)
    copy = best_seconds(lambda: other.copy_(numbers), 10, device)
    host = torch.ones(min(size, 2**28) // 4, pin_memory=device == "cuda" and not report.toy)
    upload = best_seconds(lambda: numbers[: len(host)].copy_(host), 3, device)
    return report.measured(
        bf16_tflops=2 * side**3 / product / 1e12,
        read_gb_per_second=size / read / 1e9,
        copy_gb_per_second=2 * size / copy / 1e9,  # read and written
        upload_gb_per_second=4 * len(host) / upload / 1e9,
    )
