"""Hardware, optional packages and tested versions; each missing one with its cost."""

import importlib.metadata
import importlib.resources
import importlib.util
import os
import platform
import re
import shutil
from typing import NamedTuple

from open_unitok.core.memory import available_memory
from open_unitok.core.processes import available_cores

GIB = 2**30
# Device -> what of it is tested. MPS and XPU are not emulated: a torch without them aborts in autograd on
# their tensors, and CPU kernels in their place would hide the operators and dtypes that Metal lacks.
TESTED = {
    "cpu": "all tests, on x86-64 Linux",
    "cuda": "on an emulated device only: placement, host syncs, CUDA graphs, DeepSpeed; no kernel ran",
    "mps": "untested: operators and dtypes that Metal lacks show on a Mac only",
    "xpu": "not supported, device is cpu, cuda or mps",
}
DEMO_MEMORY, DEMO_DISK = 2.7e9, 0.4e9  # bytes; measured: 2.5 GB with two processes, and 343 MB


class Check(NamedTuple):
    """One line of the report; `cost` is the consequence of a problem, empty if there is none."""

    name: str
    found: str
    cost: str = ""


def machine() -> list[Check]:
    """Python, cores, memory, disk and accelerators."""
    import torch

    checks = [
        Check("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Check("cores", str(available_cores())),
    ]
    free = available_memory()  # None on macOS and Windows: no line
    if free is not None:
        low = "the demo needs about 2.7 GB: close other programs, or lower batch_size"
        checks.append(Check("free memory", f"{free / GIB:.1f} GiB", low if free < DEMO_MEMORY else ""))
    disk = shutil.disk_usage(".").free
    full = "the demo writes about 0.4 GB: free space, or set --out to another disk"
    checks.append(Check("free disk", f"{disk / GIB:.1f} GiB", full if disk < DEMO_DISK else ""))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(i)
            checks.append(Check(f"cuda:{i}", f"{device.name}, {device.total_memory / GIB:.0f} GiB"))
    elif torch.backends.mps.is_available():
        checks.append(Check("mps", "Apple GPU: used for inference; training runs on the CPU"))
    else:
        checks.append(Check("gpu", "none", "the demo runs on the CPU; paper-scale training needs GPUs"))
    return checks


def tested_devices() -> list[Check]:
    """What is tested of each device."""
    return [Check(device, text) for device, text in TESTED.items()]


def speed() -> list[Check]:
    """bf16, flash-attn, DeepSpeed with its compiled operators, OpenMP's wait policy."""
    from open_unitok.core.devices import fast_bf16  # loads torch

    checks = []
    checks.append(
        Check("bf16", "faster than fp32")
        if fast_bf16()
        else Check("bf16", "slower than fp32", "engine.dtype auto selects fp32")
    )
    checks.append(
        Check("flash-attn", "installed")
        if importable("flash_attn")
        else Check(
            "flash-attn",
            "absent",
            "attention uses torch SDPA; flash-attn is supported, but tested with a stand-in only",
        )
    )
    # find_spec: importing deepspeed takes seconds and prints
    if importlib.util.find_spec("deepspeed") is None:
        checks.append(Check("deepspeed", "absent", "training needs it: pip install 'open-unitok[train]'"))
    else:
        checks.append(Check("deepspeed", importlib.metadata.version("deepspeed")))
        compiler, ninja = shutil.which("g++") or shutil.which("clang++"), shutil.which("ninja")
        missing = [name for name, path in (("C++ compiler", compiler), ("ninja", ninja)) if not path]
        cost = "CPU offload of the optimizer needs it; the rest works without" if missing else ""
        checks.append(
            Check("deepspeed ops", f"missing: {', '.join(missing)}" if missing else "can be compiled", cost)
        )
    # one of the two is always set: the command line sets GOMP_SPINCOUNT if the user sets neither
    if spin := os.environ.get("GOMP_SPINCOUNT"):
        checks.append(Check("OpenMP waiting", f"threads spin {spin} times, then sleep"))
    elif policy := os.environ.get("OMP_WAIT_POLICY"):
        slow = "waking threads costs small models a third of their speed: unset OMP_WAIT_POLICY"
        busy = "two processes at once slow each other down many times: export GOMP_SPINCOUNT=20000"
        checks.append(Check("OpenMP waiting", policy, slow if policy.upper() == "PASSIVE" else busy))
    return checks


def package_versions() -> list[Check]:
    """Installed versions, compared with those of the constraints file."""
    checks = []
    for name, tested in tested_versions().items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            checks.append(Check(name, "absent", f"tested with {tested}"))
            continue
        # 2.13.0+cpu is a build of 2.13.0
        same = found.split("+")[0] == tested
        checks.append(Check(name, found, "" if same else f"tested with {tested}"))
    return checks


def tested_versions() -> dict[str, str]:
    """Package -> version of configs/constraints.txt, without the development tools."""
    text = importlib.resources.files("open_unitok.configs").joinpath("constraints.txt").read_text()
    # users do not need the development tools
    text = text.partition("# for development")[0]
    return dict(re.findall(r"^([\w-]+)==(\S+)$", text, re.MULTILINE))


def importable(name: str) -> bool:
    """True if the import succeeds; flash-attn built for another torch is installed but fails to import."""
    try:
        importlib.import_module(name)
    except (ImportError, OSError):
        return False
    return True
