"""What this machine has, versions against tested ones, and what a missing thing costs."""

import importlib.metadata
import importlib.resources
import importlib.util
import os
import pathlib
import platform
import re
import shutil
import sys
from typing import NamedTuple

GIB = 2**30
DEMO_MEMORY, DEMO_DISK = 1.5e9, 0.4e9  # bytes; 1.25 GB and 343 MB were measured
# a container's memory: (limit, what is used, the key of memory.stat for cached files to give back)
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


class Check(NamedTuple):
    """One line of the report; `cost` says what a missing thing costs, and is empty where all is well."""

    name: str
    found: str
    cost: str = ""


def machine() -> list[Check]:
    """Python, cores, memory, disk and accelerators."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    checks = [
        Check("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Check("cores", str(cores)),
    ]
    free = available_memory()
    if free is not None:
        low = "the demo needs about 1.5 GB: close something, or lower batch_size"
        checks.append(Check("free memory", f"{free / GIB:.1f} GiB", low if free < DEMO_MEMORY else ""))
    disk = shutil.disk_usage(".").free
    full = "the demo writes about 0.4 GB: make room, or give it an --out elsewhere"
    checks.append(Check("free disk", f"{disk / GIB:.1f} GiB", full if disk < DEMO_DISK else ""))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(i)
            checks.append(Check(f"cuda:{i}", f"{device.name}, {device.total_memory / GIB:.0f} GiB"))
    elif torch.backends.mps.is_available():
        checks.append(Check("mps", "Apple GPU: inference runs there, training runs on the CPU"))
    else:
        checks.append(Check("gpu", "none", "the demo is made for this; paper-scale training is out of reach"))
    return checks


def speed() -> list[Check]:
    """What makes a run fast: bf16, flash-attn, DeepSpeed and its compiled operators, OpenMP's waiting."""
    from open_unitok.core.devices import bf16_in_hardware

    checks = []
    bf16 = bf16_in_hardware()
    checks.append(
        Check("bf16", "in hardware", "")
        if bf16
        else Check("bf16", "emulated", "engine.dtype auto stays at fp32, so the MLLM trains slower")
    )
    checks.append(
        Check("flash-attn", "installed")
        if importable("flash_attn")
        else Check(
            "flash-attn",
            "absent",
            "attention runs through torch SDPA; flash-attn could not be built here, so it is untested",
        )
    )
    if importlib.util.find_spec("deepspeed") is None:
        checks.append(Check("deepspeed", "absent", "training needs it: pip install 'open-unitok[train]'"))
    else:
        checks.append(Check("deepspeed", importlib.metadata.version("deepspeed")))
        compiler, ninja = shutil.which("g++") or shutil.which("clang++"), shutil.which("ninja")
        missing = [name for name, there in (("a C++ compiler", compiler), ("ninja", ninja)) if not there]
        cost = "CPU offload of the optimiser needs it; all else runs without" if missing else ""
        checks.append(
            Check("deepspeed ops", f"no {' and no '.join(missing)}" if missing else "can be compiled", cost)
        )
    # one of the two is set: where the user leaves both out, the command line takes a short spin
    if spin := os.environ.get("GOMP_SPINCOUNT"):
        checks.append(Check("OpenMP waiting", f"spins {spin} times, then sleeps"))
    elif policy := os.environ.get("OMP_WAIT_POLICY"):
        slow = "waking threads costs small models a third of their speed: leave OMP_WAIT_POLICY unset"
        busy = "two busy processes slow each other down many times: export GOMP_SPINCOUNT=20000"
        checks.append(Check("OpenMP waiting", policy, slow if policy.upper() == "PASSIVE" else busy))
    return checks


def versions() -> list[Check]:
    """Installed packages beside the versions of the constraints file."""
    checks = []
    for name, tested in tested_versions().items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            checks.append(Check(name, "absent", f"tested with {tested}"))
            continue
        same = found.split("+")[0] == tested
        checks.append(Check(name, found, "" if same else f"tested with {tested}"))
    return checks


def tested_versions() -> dict[str, str]:
    """Package -> version, from the constraints file that every install of this project uses."""
    text = importlib.resources.files("open_unitok.configs").joinpath("constraints.txt").read_text()
    text = text.partition("# for development")[0]
    return dict(re.findall(r"^([\w-]+)==(\S+)$", text, re.MULTILINE))


def available_memory() -> float | None:
    """Bytes that can still be used, the container's limit included; None where the system does not say."""
    if sys.platform != "linux":
        return None
    with open("/proc/meminfo") as file:
        found = re.search(r"MemAvailable:\s+(\d+) kB", file.read())
    free = int(found[1]) * 1024 if found else None
    for limit, used, cached in CGROUPS:
        if free is not None and pathlib.Path(limit).exists():
            free = min(free, left_in_container(pathlib.Path(limit), pathlib.Path(used), cached))
    return free


def left_in_container(limit: pathlib.Path, used: pathlib.Path, cached: str) -> float:
    """Bytes below a container's limit; cached files count as free: the system gives them back."""
    text = limit.read_text().strip()
    if text == "max":
        return float("inf")
    stat = dict(line.split() for line in limit.with_name("memory.stat").read_text().splitlines())
    return int(text) - int(used.read_text()) + int(stat.get(cached, 0))


def importable(name: str) -> bool:
    """True if the module imports: an installed flash-attn built for another torch fails only here."""
    try:
        importlib.import_module(name)
    except (ImportError, OSError):
        return False
    return True
