"""RealWorldQA (xAI): questions about photos from vehicles and daily life, with options or a short answer.

Scorer `lmms`: a letter by lmms-eval's ranking; other answers must be equal, without case and a last period.
"""

from pathlib import Path

from ..core.annotations import require_text
from ..core.answering import answer_questions
from ..core.benchmark import Options, Record, Scored, Task
from ..core.multiple_choice import (
    ChoiceQuestion,
    ChoiceRow,
    ChoiceSet,
    find_letter,
    load_choices,
    score_choices,
)

_LETTERS = ("A", "B", "C", "D")
REALWORLDQA_SIZE = 765
_PROMPTS = {"plain": "{}"}  # the question itself says how to answer

answer = answer_questions


def load(data: Path, settings: Options) -> Task:
    """One sample per row of the parquet files: question (with options and instruction), answer and image."""
    columns = ("question", "answer", "image")
    layout = ChoiceSet("RealWorldQA", ("test",), columns, read_realworldqa_row, _PROMPTS, 16)
    return load_choices(data, settings, layout)


def read_realworldqa_row(row: Record, where: str) -> ChoiceRow:
    """A question; its kind is "choice" or "open"."""
    text, truth = require_text(row, "question", where), require_text(row, "answer", where).strip()
    kind = "choice" if truth.upper() in _LETTERS else "open"
    question = ChoiceQuestion("", text, (), truth, kind, "image")
    return ChoiceRow(question, text.strip(), row["image"])


def score(task: Task, records: dict[int, Record], folder: Path, run: Record, scoring: Options) -> Scored:
    """Accuracy overall and of questions with and without options; missing answers are wrong."""
    return score_choices(
        task,
        records,
        lambda text, q: is_realworldqa_right(text, q.answer),
        {"kind": lambda q: q.kind},
        REALWORLDQA_SIZE,
    )


def is_realworldqa_right(text: str, truth: str) -> bool:
    """Whether the raw answer is correct."""
    truth = truth.strip()
    if truth.upper() in _LETTERS:
        return find_letter(text, _LETTERS) == truth.upper()
    return text.lower().strip().rstrip(".") == truth.lower()
