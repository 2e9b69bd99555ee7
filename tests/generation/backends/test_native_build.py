"""The cache of the compiled library: broken, planted or unusable files are never opened."""

import ctypes
import os
import shutil
import stat
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from open_unitok.generation.backends import native_build, native_library

needs_compiler = pytest.mark.skipif(native_library.load_library() is None, reason="no C++ compiler")
as_root = pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="needs root")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The file name and bytes of a good library."""
    folder = native_build._cache_folder()
    path = folder and native_build._cached(folder)
    if path is None:  # this machine's cache cannot be used
        compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        path = native_build._install(tmp_path_factory.mktemp("native"), compiler)
    return path.name, path.read_bytes()


@pytest.fixture
def cache(tmp_path, monkeypatch, compiled):
    """The folder of a cache of this test alone; compiling takes no time."""
    monkeypatch.delenv("UNITOK_NATIVE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def compile_(folder, compiler):
        (folder / "native.so").write_bytes(compiled[1])
        return folder / "native.so"

    monkeypatch.setattr(native_build, "_compile", compile_)
    return tmp_path / "open-unitok"


def works(library) -> bool:
    return library is not None and library.struct_size(0) == ctypes.sizeof(native_library.Matrix)


@needs_compiler
def test_the_library_is_compiled_once(cache, compiled, monkeypatch):
    assert works(native_build.open_library())
    (path,) = cache.iterdir()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700 == stat.S_IMODE(path.stat().st_mode)
    changed = path.stat().st_mtime_ns
    monkeypatch.setattr(native_build, "_compile", None)  # would fail
    assert works(native_build.open_library()) and path.stat().st_mtime_ns == changed


DAMAGE = {
    "empty": lambda good: b"",
    "text": lambda good: b"hello\n",
    "header": lambda good: good[:4096],
    "half": lambda good: good[: len(good) // 2],
    "end cut": lambda good: good[:-40000],
    "zeros": lambda good: good[:-100000] + bytes(100000),
    "one bit": lambda good: good[:100000] + bytes([good[100000] ^ 8]) + good[100001:],
}


@needs_compiler
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_library_is_replaced(cache, compiled, kind):
    name, good = compiled
    cache.mkdir()
    (cache / name).write_bytes(DAMAGE[kind](good))
    assert works(native_build.open_library())
    assert [path.read_bytes() == good for path in cache.iterdir()] == [True]


def plant(folder, name, touched):
    """A library that runs code when it is opened, with the right hash in its name."""
    source = folder / "evil.c"
    source.write_text(
        f'#include <stdlib.h>\n__attribute__((constructor)) void f(){{system("touch {touched}");}}\n'
        "long struct_size(long i){return 0;}"
    )
    evil = folder / "evil.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(evil), str(source)], check=True)
    path = folder / f"{name.rpartition('-')[0]}-{native_build._content_hash(evil)}.so"
    evil.rename(path)
    source.unlink()
    return path


@needs_compiler
@as_root
@pytest.mark.parametrize(
    "how", ["folder of another user", "folder of all", "parent of all", "file of all", "link"]
)
def test_a_planted_library_is_not_opened(cache, compiled, how, tmp_path, caplog):
    cache.mkdir()
    touched = tmp_path / "PWNED"
    path = plant(cache, compiled[0], touched)
    if how == "folder of another user":
        os.chown(cache, 65534, 65534)
    elif how == "folder of all":
        cache.chmod(0o777)
    elif how == "parent of all":
        tmp_path.chmod(0o777)
    elif how == "file of all":
        path.chmod(0o777)
    else:
        path.rename(tmp_path / "elsewhere.so")
        path.symlink_to(tmp_path / "elsewhere.so")
    assert works(native_build.open_library()) and not touched.exists()
    if "folder" in how or "parent" in how:
        assert "is not used for the compiled C++ backend" in caplog.text
    # the planted one would have run
    evil = tmp_path / "elsewhere.so" if how == "link" else path
    if evil.exists():
        ctypes.CDLL(str(evil))
        assert touched.exists()


@needs_compiler
@pytest.mark.parametrize("how", ["a file", "no home", "relative"])
def test_without_a_cache_folder_the_library_is_built_for_the_process(cache, how, monkeypatch, tmp_path):
    if how == "a file":
        cache.write_text("")
    elif how == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(native_build.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "rel")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.chdir(tmp_path)
    assert works(native_build.open_library())
    assert not (tmp_path / "rel").exists()


@needs_compiler
@as_root
def test_a_full_cache_folder_leaves_nothing(cache, caplog):
    cache.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20k,mode=700", "tmpfs", cache]).returncode:
        pytest.skip("cannot mount")
    try:
        library = native_build.open_library()
        assert list(cache.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", str(cache)], check=True)
    # the compiler itself fails on a full disk, and says so
    assert works(library) or "could not be built" in caplog.text


@needs_compiler
def test_several_processes_may_compile_at_the_same_time(cache, compiled, monkeypatch):
    barrier, write = threading.Barrier(3), native_build._compile
    monkeypatch.setattr(native_build, "_compile", lambda *args: (barrier.wait(60) and None) or write(*args))
    with ThreadPoolExecutor(3) as pool:
        assert all(map(works, pool.map(lambda _: native_build.open_library(), range(3))))
    assert [path.name for path in cache.iterdir()] == [compiled[0]]


@needs_compiler
def test_folders_of_killed_compilations_are_removed(cache, compiled):
    cache.mkdir()
    old, new = cache / "tmpold", cache / "tmpnew"
    old.mkdir(), new.mkdir()
    os.utime(old, (time.time() - 7200,) * 2)
    assert works(native_build.open_library())
    assert new.exists() and not old.exists()


@pytest.mark.parametrize("compiler", ["false", "true", "missing"])
def test_a_failing_compiler_is_not_an_error(monkeypatch, tmp_path, caplog, compiler):
    monkeypatch.delenv("UNITOK_NATIVE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if compiler == "missing":
        monkeypatch.setenv("PATH", "/nonexistent")
    else:  # fails, or writes nothing
        monkeypatch.setenv("CXX", compiler)
    caplog.set_level("INFO")
    assert native_library.load_library.__wrapped__() is None
    assert ("No C++ compiler found" if compiler == "missing" else "could not be built") in caplog.text
    monkeypatch.setenv("UNITOK_NATIVE", "0")
    assert native_library.load_library.__wrapped__() is None


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux only")
def test_more_threads_than_processors_are_not_started(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5, 7})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert native_library.num_threads() == 3
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert native_library.num_threads() == 2
