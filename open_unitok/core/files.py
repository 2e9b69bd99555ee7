"""Atomic writes of files and folders, and model paths; a killed process leaves the old or the new file."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .errors import UserError

SHIPPED_MODELS = Path(__file__).parents[1] / "models"  # models inside the package, one folder each
DEFAULT_MODEL = "scenes"  # the shipped model that commands use if no --model is given
SAMPLING_FILE = "sampling.json"  # in a model folder: its recommended sampling settings
REPLAY_FOLDER = "replay"  # in a model folder: some of the data that it was trained on, for fine-tuning


def write_atomic(path: str | Path, content: str | bytes | Callable[[BinaryIO], object]) -> None:
    """Write `content` to a temporary file next to `path`, flush it to disk, and rename it to `path`.

    Args:
        content: text, bytes, or a function that writes to the open file: for what does not fit into memory.

    Raises:
        UserError: the file cannot be written (`path` is a folder, the disk is full, ...).
    """
    path = Path(path)
    # same folder: os.replace is atomic only inside one file system
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    write = data if callable(data) else lambda file: file.write(data)
    try:
        make_folder(path.parent)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            # otherwise a power failure after the rename can leave an empty file
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        # do not leave a partial file on a full disk, or of a stopped process
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise UserError(f"Cannot write {path}: {error.strerror or error}.") from error
        raise


def make_folder(path: str | Path) -> Path:
    """Create the folder `path` with its parents if it is missing.

    Raises:
        UserError: the folder cannot be created.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot create the folder {path}: {error.strerror}.") from error
    return path


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `path` on a clean exit and is removed on an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # hidden, so that globs skip it; with the process id, so that two processes do not collide
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
    except BaseException:  # also KeyboardInterrupt
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    # flush before the rename: a power failure could otherwise leave empty files under the final name
    for file in temporary.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    # a folder cannot be replaced atomically: a kill between these lines leaves only the temporary folder
    shutil.rmtree(path, ignore_errors=True)
    os.replace(temporary, path)


def model_path(name: str | Path) -> Path:
    """Resolve a model name: an existing model folder, else the shipped model of that name, else unchanged.

    Raises:
        UserError: the default model is requested, but this installation does not contain it.
    """
    path = Path(name)
    shipped = SHIPPED_MODELS / path
    # a folder without config.json (e.g. data in "scenes/") does not hide the shipped model
    if len(path.parts) != 1 or os.path.isfile(path) or os.path.exists(path / "config.json"):
        return path
    if os.path.exists(shipped / "config.json"):
        return shipped
    if path == Path(DEFAULT_MODEL):
        raise UserError(
            f"This installation does not contain the model {DEFAULT_MODEL!r}: "
            f"train it with `make model` (hours) and "
            f"pass --model runs/{DEFAULT_MODEL}/model, or pass the folder or hub id of another model."
        )
    return path


def tokenizer_path(name: str | Path) -> Path:
    """As `model_path`, for a visual tokenizer; an MLLM folder contains one in `unitok/`."""
    path = model_path(name)
    inside = path / "unitok"
    return inside if os.path.exists(inside / "config.json") else path


def write_json(path: str | Path, value: Any) -> None:
    """Atomically write `value` as strict JSON (NaN is rejected)."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: str | Path, records: Iterable[Any]) -> None:
    """Atomically write JSON lines."""
    write_atomic(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def existing(path: str | Path, hint: str = "") -> Path:
    """`path` as a Path.

    Raises:
        UserError: it does not exist; the message ends with `hint`.
    """
    path = Path(path)
    if not os.path.exists(path):  # Path.exists raises on names that are too long
        raise UserError(f"{path} does not exist.{' ' + hint if hint else ''}")
    return path


def sha256(path: str | Path) -> str:
    """Hex sha256 digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
