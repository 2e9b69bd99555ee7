"""Reading and writing files so that a kill at any moment leaves either the old file or the new one."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .errors import UserError

MODELS = Path(__file__).parents[1] / "models"  # those that ship with the package, a folder each
SAMPLING_FILE = "sampling.json"  # in a model folder: the sampling settings that suit the model
SHIPPED = "scenes"  # the one that commands take where none is named


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write `content` to a temporary file beside `path`, flush it to disk, and rename it over `path`.

    Raises:
        UserError: a folder stands there, a file in the way, the disk is full, ...
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        make_folder(path.parent)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error


def make_folder(path: str | Path) -> Path:
    """The folder `path`, made where it is missing.

    Raises:
        UserError: it cannot be.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be a folder: {error.strerror}.") from error
    return path


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder; on a clean exit it takes the place of `path`, on an error it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for file in temporary.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    shutil.rmtree(path, ignore_errors=True)
    os.replace(temporary, path)


def model_path(name: str | Path) -> Path:
    """The path meant by a model's name: a shipped model's, unless there is a model of this name here.

    Raises:
        UserError: the shipped model is meant, and this copy comes without it.
    """
    path = Path(name)
    shipped = MODELS / path
    if len(path.parts) != 1 or os.path.isfile(path) or os.path.exists(path / "config.json"):
        return path
    if os.path.exists(shipped / "config.json"):
        return shipped
    if path == Path(SHIPPED):
        raise UserError(
            f"The model {SHIPPED!r} is not in this copy: train it with `make model` (hours) and give "
            f"--model runs/{SHIPPED}/model, or give the folder or hub id of another one."
        )
    return path


def tokenizer_path(name: str | Path) -> Path:
    """As `model_path`, of a visual tokenizer: an MLLM's is in its `unitok/`."""
    path = model_path(name)
    within = path / "unitok"
    return within if os.path.exists(within / "config.json") else path


def write_json(path: str | Path, value: Any) -> None:
    """Atomically write `value` as strict JSON (NaN is refused)."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[Any]) -> None:
    """Atomically write one JSON value per line."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing or is not JSON; the message names it.
    """
    try:
        return json.loads(existing(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def read_lines(path: str | Path) -> list[Any]:
    """The values of a file of JSON lines; a line that is none stands as the UserError that says so.

    Raises:
        UserError: the file is missing.
    """
    found: list[Any] = []
    with open(existing(path), "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                found.append(json.loads(line))
            except ValueError as error:  # no JSON, or no UTF-8
                found.append(UserError(f"{path}, line {number}, is not valid JSON: {error}"))
    return found


def read_jsonl(path: str | Path) -> list[Any]:
    """Read one JSON value per line.

    Raises:
        UserError: the file is missing, or a line is not JSON; the message names file and line.
    """
    rows = read_lines(path)
    for row in rows:
        if isinstance(row, UserError):
            raise row
    return rows


def existing(path: str | Path, hint: str = "") -> Path:
    """`path` as a Path.

    Raises:
        UserError: nothing is there; the message names the path and ends with `hint`.
    """
    path = Path(path)
    if not os.path.exists(path):  # Path's own raises on names that are too long
        raise UserError(f"{path} does not exist.{' ' + hint if hint else ''}")
    return path


def sha256(path: str | Path) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
