"""AI2D (arXiv 1603.07396): questions with four options about diagrams of school books.

Scorer `lmms`: the answer without case and punctuation is the letter, or starts with the letter and a period.
"""

import string
from pathlib import Path

from open_unitok.core.errors import UserError

from ..core.annotations import require_key, require_text
from ..core.answering import answer_questions
from ..core.benchmark import Options, Record, Scored, Task
from ..core.multiple_choice import (
    ChoiceQuestion,
    ChoiceRow,
    ChoiceSet,
    lettered_options,
    load_choices,
    score_choices,
)

_PROMPTS = {"letter": "{}\nAnswer with the option's letter from the given choices directly."}
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LETTERS = "ABCDEFGH"
AI2D_SIZE = 3088

answer = answer_questions


def load(data: Path, settings: Options) -> Task:
    """One sample per row of lmms-lab's parquet files: question, options, answer (an index) and image."""
    columns = ("question", "options", "answer", "image")
    return load_choices(data, settings, ChoiceSet("AI2D", ("test",), columns, read_ai2d_row, _PROMPTS, 16))


def read_ai2d_row(row: Record, where: str) -> ChoiceRow:
    """A question; its answer is an index as text, from 0."""
    options = require_key(row, "options", where)
    if not isinstance(options, list) or not 2 <= len(options) <= len(_LETTERS):
        raise UserError(f"{where}: options is {options!r}; expected a list of two to {len(_LETTERS)}.")
    label = str(require_key(row, "answer", where))
    if not label.isdecimal() or int(label) >= len(options):
        raise UserError(
            f"{where}: answer is {label!r}; it must be the index of one of {len(options)} options."
        )
    text = require_text(row, "question", where)
    question = ChoiceQuestion("", text, tuple(map(str, options)), _LETTERS[int(label)], "", "image")
    return ChoiceRow(question, lettered_options(text, options), row["image"])


def score(task: Task, records: dict[int, Record], folder: Path, run: Record, scoring: Options) -> Scored:
    """Accuracy; missing answers are wrong."""
    return score_choices(task, records, lambda text, q: is_ai2d_right(text, q.answer), {}, AI2D_SIZE)


def is_ai2d_right(text: str, letter: str) -> bool:
    """Whether the raw answer is correct."""
    text = text.strip()
    # "B. the sun" is B
    chosen = text[0] if text[1:2] == "." and text[0] in string.ascii_uppercase else text
    return chosen.lower().translate(_PUNCTUATION) == letter.lower()
