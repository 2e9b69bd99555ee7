"""Questions with lettered options (SEED-Bench, ScienceQA)."""

from collections.abc import Sequence
from typing import NamedTuple

from .benchmark import Record, Task
from .records import sample_record

OPTION_LETTERS = "ABCDE"


class ChoiceQuestion(NamedTuple):
    """A question with lettered options; `answer` is the right letter."""

    question_id: str
    question: str
    options: tuple[str, ...]
    answer: str
    kind: str  # SEED-Bench: the dimension; ScienceQA: the subject
    medium: str  # "image", "video" or "text"


def malformed_choice(name: str, medium: str = "", kind: str = "") -> ChoiceQuestion:
    """In the place of a malformed question."""
    return ChoiceQuestion(name, "", (), "", kind, medium)


def lettered_options(question: str, options: Sequence[str]) -> str:
    """The question with its options below, one a line."""
    # the layout of LLaVA's and the published runs' prompts
    lines = (f"{letter}. {option}" for letter, option in zip(OPTION_LETTERS, options))
    return "\n".join([question, *lines])


def choice_records(task: Task, records: dict[int, Record], values: Sequence[float]) -> list[Record]:
    """A line of scores.jsonl per question, with its options; `task.truth` holds the questions."""
    return [
        sample_record(s, records, value, q.answer, q.kind, lettered_options(q.question, q.options))
        for s, q, value in zip(task.samples, task.truth, values)
    ]
