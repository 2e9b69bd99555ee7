"""Compile guard.cpp once per machine, and the environment in which Python has the emulated CUDA device."""

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "emulated_cuda" / "guard.cpp"
ROOT = HERE.parents[1]


class NoCompilerError(RuntimeError):
    """There is no C++ compiler, so the emulated device cannot be built."""


def environment(devices: int = 1, **variables: str) -> dict[str, str]:
    """Environment variables of a Python process that has `devices` emulated CUDA devices.

    Raises:
        NoCompilerError: no C++ compiler was found.
    """
    paths = [str(HERE / "emulated_cuda" / "site"), str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "EMULATED_CUDA_GUARD": str(compile_guard()),
        "EMULATED_CUDA_DEVICES": str(devices),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        **variables,
    }


def compile_guard() -> Path:
    """The compiled guard, from this user's temporary folder where it is there already.

    Raises:
        NoCompilerError: no C++ compiler was found.
    """
    torch = Path(importlib.util.find_spec("torch").submodule_search_locations[0])  # pyright: ignore
    key = hashlib.sha256(SOURCE.read_bytes() + importlib.metadata.version("torch").encode() + bytes(torch))
    folder = Path(tempfile.gettempdir()) / f"open-unitok-emulated-cuda-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    library = folder / f"guard-{key.hexdigest()[:16]}.so"
    if not library.exists():
        compiler = next(
            filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None
        )
        if compiler is None:
            raise NoCompilerError("the emulated CUDA device needs a C++ compiler (g++ or clang++)")
        include, libraries = torch / "include", torch / "lib"
        with tempfile.TemporaryDirectory(dir=folder) as work:
            built = Path(work) / library.name
            flags = ["-O1", "-std=c++20", "-shared", "-fPIC", f"-I{include}", f"-L{libraries}"]
            links = ["-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}"]
            command = [compiler, *flags, str(SOURCE), "-o", str(built), *links]
            subprocess.run(command, check=True, capture_output=True, text=True)
            built.replace(library)  # another process never loads half a file
    return library
