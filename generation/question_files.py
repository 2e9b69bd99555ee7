"""Question and answer files in JSON lines, shared by the processes of a torchrun launch."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from open_unitok.core.errors import UserError
from open_unitok.core.files import make_folder, write_jsonl
from open_unitok.core.text_files import is_unicode, read_json_lines


def read_questions(path: str | Path) -> list[dict[str, Any]]:
    """Read the records {"image": PATH, "question": TEXT, ...}; a relative PATH is relative to the file, or to
    the working folder if the file is /dev/stdin.

    Raises:
        UserError: the file is missing, a folder or empty, or a record lacks one of the two texts.
    """
    path = Path(path)
    records = read_json_lines(path)
    for i, record in enumerate(records):
        texts = [record.get(key) for key in ("image", "question")] if isinstance(record, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{path}, record {i}, is {record!r}; it must have the texts image and question.")
        if not is_unicode(json.dumps(record, ensure_ascii=False)):
            raise UserError(f"{path}, record {i}, holds half of a surrogate pair.")
    if not records:
        raise UserError(f"{path} has no questions.")
    folder = Path() if path.is_relative_to("/dev") or path.is_relative_to("/proc") else path.parent
    return [{**record, "image": str(folder / record["image"])} for record in records]


def prepare_answer_file(out: Path, rank: int, world_size: int) -> None:
    """Create the folder of `out` and delete this rank's part of an interrupted launch.

    Raises:
        UserError: `out` is a folder, or its folder cannot be created.
    """
    if os.path.isdir(out):
        raise UserError(f"--out {out} is a folder; expected a file of JSON lines.")
    make_folder(out.parent)
    _parts(out, world_size)[rank].unlink(missing_ok=True)


def write_answers(out: Path, records: Sequence[dict[str, Any]], rank: int, world_size: int) -> None:
    """Write the answers of one rank, to the questions rank, rank + world_size, ...

    Each rank writes its own part. No rank waits: a rank that finds all parts merges them in order.
    """
    if world_size == 1:
        write_jsonl(out, records)
        return
    parts = _parts(out, world_size)
    write_jsonl(parts[rank], records)
    try:
        answers = [read_json_lines(part) for part in parts]
    except UserError:  # a part is missing: its rank is not finished, or another rank has merged all parts
        return
    # question i is record i // world_size of rank i % world_size
    total = sum(map(len, answers))
    write_jsonl(out, [answers[i % world_size][i // world_size] for i in range(total)])
    for part in parts:
        part.unlink(missing_ok=True)


def _parts(out: Path, world_size: int) -> list[Path]:
    """The file of each rank."""
    return [out.with_name(f".{out.name}.{i}-of-{world_size}") for i in range(world_size)]
