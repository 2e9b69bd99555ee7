"""Tiny models and helpers that scenarios share."""

import contextlib
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[2]


class Folders:
    """pytest's tmp_path_factory, for fixtures that are called as functions."""

    def mktemp(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=name))


def load_conftest(folder: str) -> Any:
    """The module tests/FOLDER/conftest.py, for its makers of tiny models."""
    spec = importlib.util.spec_from_file_location(f"{folder}_conftest", TESTS / folder / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def planted(owner: Any, name: str, value: Any) -> Iterator[None]:
    """A fault in the place of an attribute."""
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def error_of(work: Any) -> str:
    """The error of a call that must fail, in one line."""
    try:
        work()
    except (RuntimeError, TypeError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""
