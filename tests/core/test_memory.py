"""Memory that a training on a CPU has freed."""

import platform
import subprocess
import sys

import pytest

from open_unitok.core import memory

# page faults of allocating and freeing 40 MiB a hundred times; glibc keeps up to 32 MiB by itself
FAULTS = """
import resource, sys
import torch
from open_unitok.core.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
torch.zeros(10 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(100):
    torch.ones(10 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_not_faulted_in_again():
    def faults(way):
        done = subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("kept") < faults("returned") / 5


def test_without_mallopt_nothing_happens(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert not memory.keep_freed_memory()
