"""Questions with lettered options (SEED-Bench, ScienceQA)."""

from collections.abc import Sequence
from typing import NamedTuple

from .benchmark import Record, Task
from .records import sample_record

OPTION_LETTERS = "ABCDE"


class ChoiceQuestion(NamedTuple):
    """A question with lettered options; `answer` is the correct letter."""

    question_id: str
    question: str
    options: tuple[str, ...]
    answer: str
    kind: str  # SEED-Bench: the dimension; ScienceQA: the subject
    medium: str  # "image", "video" or "text"


def malformed_choice(name: str, medium: str = "", kind: str = "") -> ChoiceQuestion:
    """The placeholder of a malformed question; no answer is correct."""
    return ChoiceQuestion(name, "", (), "", kind, medium)


def lettered_options(question: str, options: Sequence[str]) -> str:
    """The question followed by its options, one per line."""
    # the prompt layout of LLaVA and of the published runs
    lines = (f"{letter}. {option}" for letter, option in zip(OPTION_LETTERS, options))
    return "\n".join([question, *lines])


def choice_records(task: Task, records: dict[int, Record], values: Sequence[float]) -> list[Record]:
    """Records of scores.jsonl; `task.truth` is the list of `ChoiceQuestion`."""
    return [
        sample_record(s, records, value, q.answer, q.kind, lettered_options(q.question, q.options))
        for s, q, value in zip(task.samples, task.truth, values)
    ]
