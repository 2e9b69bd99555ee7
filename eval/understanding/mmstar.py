"""MMStar (arXiv 2403.20330): 1,500 questions in six categories that need their image.

Scorers: `official` (default) reads the letter at the start of the answer; `lmms` ranks the places where a
letter stands, and averages the eighteen finer categories.
"""

from pathlib import Path

from open_unitok.core.errors import UserError

from ..core.annotations import require_key, require_text
from ..core.answering import answer_questions
from ..core.benchmark import Metric, Options, Record, Scored, Task
from ..core.bootstrap import bootstrap, group_mean_columns, group_mean_statistic
from ..core.multiple_choice import (
    ChoiceQuestion,
    ChoiceRow,
    ChoiceSet,
    find_letter,
    lettered_options,
    load_choices,
    score_choices,
)

_LETTERS = ("A", "B", "C", "D")
MMSTAR_SIZE = 1500
# without a period at the end, as in lmms-eval
_PROMPTS = {"lmms": "{}\nAnswer with the option's letter from the given choices directly"}
_STARTS = ("", "(", "option ", "the answer is ")

answer = answer_questions


def load(data: Path, settings: Options) -> Task:
    """One sample per row of Lin-Chen/MMStar's parquet file, or of VLMEvalKit's `MMStar.tsv`."""
    columns = ("question", "image", "answer", "category", "l2_category")
    layout = ChoiceSet("MMStar", ("val",), columns, read_mmstar_row, _PROMPTS, 128, "*MMStar*.tsv")
    return load_choices(data, settings, layout)


def read_mmstar_row(row: Record, where: str) -> ChoiceRow:
    """A question; `kind` is its category, `medium` its finer category."""
    label = require_text(row, "answer", where).strip().upper()
    if label not in _LETTERS:
        raise UserError(f"{where}: answer is {label!r}; allowed: A, B, C, D.")
    text = require_text(row, "question", where).strip()
    # the options are part of the question on the hub, and columns of their own in the table
    options = tuple(str(row[letter]) for letter in _LETTERS if row.get(letter))
    name = str(row.get("index", ""))
    category, finer = (str(require_key(row, key, where)) for key in ("category", "l2_category"))
    prompt = text if "Options:" in text or not options else lettered_options(text, options)
    return ChoiceRow(ChoiceQuestion(name, text, options, label, category, finer), prompt, row["image"])


def score(task: Task, records: dict[int, Record], folder: Path, run: Record, scoring: Options) -> Scored:
    """Accuracy overall and by category, `lmms`: over finer categories; missing answers are wrong."""
    scored = score_choices(
        task,
        records,
        lambda text, q: is_mmstar_right(text, q.answer, scoring.scorer),
        {"category": lambda q: q.kind, "l2": lambda q: q.medium},
        MMSTAR_SIZE,
    )
    if scoring.scorer != "lmms":
        return scored
    # the published average is over finer categories, within a category and overall
    rows = [row | {"group": q.medium} for row, q in zip(scored.per_sample, task.truth)]

    def finer_mean(kept: list[Record]) -> Metric:
        values, groups, clusters = zip(*((r["score"], r["group"], r["cluster"]) for r in kept))
        columns = group_mean_columns(values, groups)
        interval = bootstrap(columns, clusters, group_mean_statistic)
        return Metric(float(group_mean_statistic(columns.sum(axis=0))), len(kept), interval)

    metrics = {"average": finer_mean(rows)}
    for kind in sorted({q.kind for q in task.truth if q.kind}):
        metrics[f"category/{kind}"] = finer_mean([r for r, q in zip(rows, task.truth) if q.kind == kind])
    finer = {name: metric for name, metric in scored.metrics.items() if name.startswith("l2/")}
    return scored._replace(metrics=metrics | finer, per_sample=rows, statistic="group mean")


def is_mmstar_right(text: str, letter: str, scorer: str = "official") -> bool:
    """Whether the raw answer is correct."""
    if scorer == "lmms":
        return find_letter(text, _LETTERS) == letter
    text = text.lower().strip().replace("\n", " ")
    return any(text.startswith(start + letter.lower()) for start in _STARTS)
