"""Run by Python at its start: gives the process the emulated CUDA device once it imports torch."""

import ctypes
import importlib.abc
import importlib.util
import os
import sys


class TorchFinder(importlib.abc.MetaPathFinder):
    """Loads the guard before torch, and installs the device after it."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module):
            ctypes.CDLL(os.environ["EMULATED_CUDA_GUARD"], mode=ctypes.RTLD_GLOBAL)
            execute(module)
            import emulated_cuda

            emulated_cuda.install()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "EMULATED_CUDA_GUARD" in os.environ:
    sys.meta_path.insert(0, TorchFinder())
