"""Checkpoints in the background: a copy on the host in the step, files and hashes beside the next steps."""

import contextlib
import copy
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from open_unitok.core.errors import UserError
from open_unitok.core.text_files import read_json

Writes = list[Callable[[], Any]]
WAIT_MINUTES = 30.0  # for the files of other ranks


class BackgroundWrites:
    """Runs `work` in a thread; an error is raised by `check` and by `wait`, once."""

    def __init__(self, work: Callable[[], None]):
        self._error: BaseException | None = None
        self._work = work
        # a daemon: a process that ends by an error elsewhere must not hang on a disk
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # raised in the training thread
            self._error = error

    def check(self) -> None:
        """Raise the error of the work, if it has failed."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Wait for the end of the work, then `check`."""
        self._thread.join()
        self.check()


def to_host(value: Any, known: dict[Any, torch.Tensor] | None = None) -> Any:
    """A copy of nested dicts, lists and tuples whose tensors are copies on the host; tied ones stay tied."""
    known = {} if known is None else known
    if isinstance(value, torch.Tensor):
        value = value.detach()
        if value.is_meta or not value.numel():
            return value.clone()
        key = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if key not in known:
            known[key] = value.to("cpu", copy=True)
        return known[key]
    if isinstance(value, dict):
        # keeps the type, and the _metadata of a state dict
        copied = copy.copy(value)
        for name, inner in value.items():
            copied[name] = to_host(inner, known)
        return copied
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_host(inner, known) for inner in value))
    if isinstance(value, list | tuple):
        return type(value)(to_host(inner, known) for inner in value)
    return value


@contextlib.contextmanager
def deferred_saves(engine: Any, writes: Writes) -> Iterator[None]:
    """Within, what a DeepSpeed engine saves is copied to the host; `writes` gets the calls that write it."""
    original = getattr(engine, "checkpoint_engine", None)
    if original is None:  # an engine that writes by itself
        yield
        return
    engine.checkpoint_engine = _Deferred(original, writes)
    try:
        yield
    finally:
        engine.checkpoint_engine = original


class _Deferred:
    """DeepSpeed's checkpoint engine, whose `save` copies now and writes later."""

    def __init__(self, engine: Any, writes: Writes):
        self._engine, self._writes = engine, writes

    def save(self, state_dict: Any, path: str) -> None:
        self._writes.append(partial(self._engine.save, to_host(state_dict), path))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def await_files(folder: Path, count: int) -> dict[str, Any]:
    """The merged contents of the JSON files that `count` ranks write into a folder.

    Ranks do not talk in the background, where a collective would mix with those of the training thread.

    Raises:
        UserError: after half an hour.
    """
    until = time.monotonic() + 60 * WAIT_MINUTES
    while len(files := sorted(folder.glob("*.json"))) < count:
        if time.monotonic() > until:
            raise UserError(f"{folder}: {count - len(files)} of {count} rank(s) wrote no checkpoint.")
        time.sleep(0.02)
    return {name: facts for file in files for name, facts in read_json(file).items()}
