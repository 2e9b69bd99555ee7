"""Files of answers that other programs write, read as (id, text, prompt).

- LLaVA's answers, JSON lines: question_id, prompt, text.
- Results of VQAv2, TextVQA, VizWiz, GQA and SEED-Bench, a JSON list or lines: question_id, image or
  questionId, and answer or prediction.
- MM-Vet's results, JSON: {id: text}; its grade file: {id: {model, content, score}}.
- ScienceQA's results, JSON: {results: {id: index}}, from LLaVA with {outputs: {id: text}}.
- MMBench's upload, xlsx, tsv or csv: columns index and prediction.
- `Your_Results` of MME's tool: a folder with a file per task, lines of image, question, truth and answer.
- GenEval's `results.jsonl`: filename, prompt, correct, reason.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing
from open_unitok.core.text_files import numbered_lines, read_csv, read_json, read_json_lines, read_text

from ..core.benchmark import Record
from ..core.multiple_choice import OPTION_LETTERS
from ..judges.llm_judge import is_grade_file
from ..understanding.mme import MME_TASKS

_ID_KEYS = ("question_id", "questionId", "index", "image", "id")
# "answer" last: in a table it may be the truth beside the prediction
_TEXT_KEYS = ("prediction", "text", "response", "answer")
_PROMPT_KEYS = ("prompt", "question")
GRADED = "(graded, without its text)"  # the answer of an entry of MM-Vet's grade file


class GivenAnswer(NamedTuple):
    """One answer of a file; `prompt` is "" if the file does not say what was asked."""

    id: str
    text: str
    prompt: str
    where: str  # for error texts
    more: Record  # e.g. GenEval's verdict


def read_answers(path: str | Path) -> tuple[list[GivenAnswer], list[str]]:
    """The answers of a file or folder, and the errors of entries that are malformed.

    Raises:
        UserError: it is in none of the known formats, or holds no answer.
    """
    path = existing(path)
    rows = _mme_rows(path) if path.is_dir() else _file_rows(path)
    answers, malformed = [], []
    for where, row in rows:
        try:
            answers.append(_answer(row, where))
        except UserError as error:
            malformed.append(str(error))
    if not answers:
        raise UserError(f"{path} holds no answer that can be read. {(malformed or ['It is empty.'])[0]}")
    return answers, malformed


def _answer(row: Any, where: str) -> GivenAnswer:
    """The answer of one entry; UserError if a key is missing."""
    if isinstance(row, UserError):
        raise row
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object, got {type(row).__name__}.")
    if "filename" in row and "correct" in row:
        # .../00000/samples/0000.png
        name = PurePosixPath(str(row["filename"]).replace("\\", "/")).with_suffix("")
        more = {
            "file": str(row["filename"]),
            "correct": bool(row["correct"]),
            "reason": str(row.get("reason") or ""),
        }
        return GivenAnswer("/".join(name.parts[-3:]), "", str(row.get("prompt") or ""), where, more)
    name = next((row[key] for key in _ID_KEYS if row.get(key) is not None), None)
    text = next((row[key] for key in _TEXT_KEYS if row.get(key) is not None), None)
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise UserError(f"{where}: expected an id under one of {', '.join(_ID_KEYS)}, got {name!r}.")
    if not isinstance(text, str | int | float):
        raise UserError(f"{where}: expected an answer under one of {', '.join(_TEXT_KEYS)}, got {text!r}.")
    prompt = next((row[key] for key in _PROMPT_KEYS if isinstance(row.get(key), str)), "")
    return GivenAnswer(str(name), str(text), prompt, where, {})


def _file_rows(path: Path) -> Iterable[tuple[str, Any]]:
    """(place, entry) of every entry of a file."""
    kind = path.suffix.lower()
    if kind == ".txt" and path.stem in MME_TASKS:
        raise UserError(f"{path} is one task of MME's tool: pass the folder, {path.parent}.")
    if kind == ".xlsx":
        return _sheet_rows(path)
    if kind in (".tsv", ".csv"):
        table = read_csv(path, delimiter="\t" if kind == ".tsv" else ",")
        return ((f"{path}, row {i}", row) for i, row in enumerate(table, 1))
    try:
        content = read_json(read_text(path).encode(), str(path))
    except UserError:  # not one JSON value: JSON lines
        lines = read_json_lines(path, lenient=True)
        return ((f"{path}, line {i}", row) for i, row in enumerate(lines, 1))
    if isinstance(content, list):
        return ((f"{path}, entry {i}", row) for i, row in enumerate(content, 1))
    if isinstance(content, dict) and not any(
        key in content for key in ("question_id", "questionId", "filename")
    ):
        return _object_rows(path, content)
    return [(f"{path}, line 1", content)]


def _object_rows(path: Path, content: Record) -> Iterator[tuple[str, Any]]:
    """The entries of an object {id: answer}, of ScienceQA's results, or of MM-Vet's grade file."""
    results = content.get("results")
    if isinstance(results, dict):
        # LLaVA's scorer also keeps the texts, which its parser has read already
        content = content["outputs"] if isinstance(content.get("outputs"), dict) else results
    graded = is_grade_file(content)
    for name, value in content.items():
        if graded:
            value = GRADED
        elif isinstance(value, int) and isinstance(results, dict):
            # the index of an option; -1 for an answer that could not be read
            value = OPTION_LETTERS[value] if 0 <= value < len(OPTION_LETTERS) else ""
        yield f"{path}, {name}", {"id": name, "text": value}


def _sheet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of the first sheet of a workbook."""
    try:
        from openpyxl import load_workbook
        from openpyxl.utils.exceptions import InvalidFileException
    except ImportError as error:
        raise UserError(f"Reading {path} needs openpyxl: pip install 'open-unitok[eval]'.") from error
    try:
        sheet = load_workbook(path, read_only=True, data_only=True).worksheets[0]
    except (InvalidFileException, OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} is not a readable workbook: {error}") from error
    rows = sheet.iter_rows(values_only=True)
    head = [str(cell) for cell in next(rows, ())]
    for i, cells in enumerate(rows, 2):
        if any(cell is not None for cell in cells):
            # an empty cell is an empty answer, not a missing column
            yield f"{path}, row {i}", {k: "" if v is None else v for k, v in zip(head, cells)}


def _mme_rows(folder: Path) -> Iterator[tuple[str, Any]]:
    """The lines of the files that MME's tool scores."""
    files = [folder / f"{name}.txt" for name in MME_TASKS if (folder / f"{name}.txt").is_file()]
    if not files:
        raise UserError(f"{folder} is a folder without the files of MME's tool ({MME_TASKS[0]}.txt, ...).")
    for file in files:
        for number, line in numbered_lines(file):
            if not line.strip():
                continue
            where, fields = f"{file}, line {number}", line.split("\t")
            if len(fields) != 4:
                error = f"{where}: expected image, question, truth and answer, separated by tabs: {line!r}."
                yield where, UserError(error)
                continue
            image, question, _, text = fields
            yield where, {"id": f"{file.stem}/{image}", "prompt": question, "text": text}
