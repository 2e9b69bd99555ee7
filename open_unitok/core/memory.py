"""Free memory of this process: of the machine, of its container, and within its resource limits."""

import ctypes
import pathlib
import re
import sys

from .errors import UserError

# memory of a container, cgroup v2 and v1: (limit, usage, key of the reclaimable page cache in memory.stat)
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "total_inactive_file",
    ),
)

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for the next allocation, and say whether it does.

    By default it maps large blocks anew and returns them when freed, so that each operator of a training step
    on a CPU faults in its outputs page by page, zeroed by the kernel. A process that keeps them holds a few
    per cent more, and its values are the same bits. benchmarks/tokenizer_training.py measures both.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # Windows, macOS, musl
        return False
    return all([mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, -1)])


def available_memory() -> float | None:
    """Bytes that this process can still allocate; None if the system does not report it."""
    if sys.platform != "linux":
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", pathlib.Path("/proc/meminfo").read_text())
    if found is None:
        return None
    free = int(found[1]) * 1024.0
    # in a container /proc/meminfo shows the memory of the host
    for limit, used, cached in _CGROUPS:
        if pathlib.Path(limit).exists():
            free = min(free, container_memory_left(pathlib.Path(limit), pathlib.Path(used), cached))
    return min(free, limited_memory_left())


def container_memory_left(limit: pathlib.Path, used: pathlib.Path, cached: str) -> float:
    """Bytes below a cgroup's limit; reclaimable page cache counts as free."""
    text = limit.read_text().strip()
    # cgroup v2 writes "max" for no limit, v1 a number near 2**63
    if text == "max":
        return float("inf")
    # page cache is reclaimed under pressure, so it counts as free
    stat = dict(line.split() for line in limit.with_name("memory.stat").read_text().splitlines())
    return int(text) - int(used.read_text()) + int(stat.get(cached, 0))


def limited_memory_left() -> float:
    """Bytes below the limits of `ulimit -v` and `ulimit -d`; infinity without limits."""
    import resource  # not on Windows

    # (limit, the number in /proc/self/statm that it bounds, in pages)
    sizes = [int(field) for field in pathlib.Path("/proc/self/statm").read_text().split()]
    left = float("inf")
    for kind, used in ((resource.RLIMIT_AS, sizes[0]), (resource.RLIMIT_DATA, sizes[5])):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            left = min(left, soft - used * resource.getpagesize())
    return max(left, 0.0)


def check_memory(needed: float, what: str, free: float | None = None) -> None:
    """
    Args:
        needed: bytes. what: subject of the error text. free: bytes; None = `available_memory()`.

    Raises:
        UserError: fewer bytes are available.
    """
    free = available_memory() if free is None else free
    if free is not None and needed > free:
        raise UserError(f"{what} needs {format_bytes(needed)} of memory; {format_bytes(free)} are available.")


def is_memory_error(error: BaseException) -> bool:
    """Whether an allocation has failed; torch and safetensors raise a RuntimeError, systems an OSError."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text


def memory_reason(error: BaseException) -> str:
    """One line about an allocation that has failed: what is available, and what the library says."""
    free, text = available_memory(), " ".join(str(error).split())[:200]
    left = "" if free is None else f" ({format_bytes(free)} are available)"
    return f"not enough memory{left}{': ' if text else ''}{text}"


def format_bytes(count: float) -> str:
    """ "512 MB", "14.2 GB", "1.3 TB"."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB" if count < 1000 else f"{count / 1000:,.1f} TB"
