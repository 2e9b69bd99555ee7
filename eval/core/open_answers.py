"""Open questions with ten human answers each (VQAv2, TextVQA, VizWiz): readers and leave-one-out accuracy."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from open_unitok.core.errors import UserError, did_you_mean

from .annotations import require_key
from .answer_normalisation import normalise, normalise_m4c, one_line, strip_punctuation
from .answering import answer_texts
from .benchmark import Options, Record, Scored, Task
from .records import cluster_of, mean_metric, mean_metrics_by, sample_record

VQAV2_SCORERS = ("lmms", "official", "official-2018")


class OpenQuestion(NamedTuple):
    """A question and its ten answers; empty if they are not public."""

    question_id: Any
    question: str
    answers: tuple[str, ...] = ()
    kind: str = ""  # VizWiz: yes/no, number, other, unanswerable


def leave_one_out_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Mean over annotators of min(1, matches among the other answers / 3); the arguments are normalised."""
    matches, total = sum(answer == prediction for answer in answers), len(answers)
    # an annotator whose answer matches has one match fewer among the others
    return (matches * min(1.0, (matches - 1) / 3) + (total - matches) * min(1.0, matches / 3)) / total


def m4c_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Leave-one-out accuracy, both sides normalised by the M4C/EvalAI processor."""
    return _cached_accuracy(normalise_m4c(prediction), tuple(map(normalise_m4c, answers)))


# models repeat short answers such as "yes" thousands of times
_cached_accuracy = functools.lru_cache(maxsize=100_000)(leave_one_out_accuracy)


def vqa_accuracy(prediction: str, answers: Sequence[str], scorer: str = "lmms") -> float:
    """Leave-one-out accuracy of one answer by a variant of the scorer."""
    if scorer not in VQAV2_SCORERS:
        raise UserError(f"scorer is {scorer!r}." + did_you_mean(scorer, VQAV2_SCORERS))
    if scorer == "lmms":
        prediction, answers = normalise(prediction, "m4c"), [normalise(a, "m4c") for a in answers]
    else:
        differ = len(set(answers)) > 1
        # the older tool normalises the prediction always, the answers only if they differ
        if scorer == "official-2018":
            prediction = normalise(prediction)
            answers = [strip_punctuation(a) if differ else a for a in answers]
        elif differ:
            prediction, answers = normalise(prediction), [normalise(a) for a in answers]
        else:
            prediction = one_line(prediction)
    return leave_one_out_accuracy(prediction, answers)


def annotator_answers(row: Record, where: str) -> tuple[str, ...]:
    """The answers of an entry: strings, or objects {"answer": text, ...}.

    Raises:
        UserError: there are none, or one of them has no text.
    """
    answers = require_key(row, "answers", where)
    if not isinstance(answers, list) or not answers:
        raise UserError(f"{where}: answers is {answers!r}; expected a list of answers.")
    texts = [
        require_key(a, "answer", f"{where}, answers[{j}]") if isinstance(a, dict) else a
        for j, a in enumerate(answers)
    ]
    # numbers are valid: JSON releases hold answers such as 2
    if (bad := next((t for t in texts if not isinstance(t, str | int | float)), "")) != "":
        raise UserError(f"{where}: one of the answers is {bad!r}; it must be a text.")
    return tuple(map(str, texts))


def without_empty_answers(row: Record) -> Record:
    """The row, without "answers" if they are empty: how the hub's test sets say that they are not public."""
    texts = [a.get("answer") if isinstance(a, dict) else a for a in row.get("answers") or ()]
    return row if any(texts) else {key: value for key, value in row.items() if key != "answers"}


def with_annotator_answers(rows: Sequence[Any], where: Callable[[int], str]) -> list[Any]:
    """The rows with their answers as strings; a row with malformed answers becomes a UserError."""
    # a test set has no answers at all; if some rows have them, a row without is malformed
    public = any(isinstance(row, dict) and "answers" in row for row in rows)
    result = []
    for i, row in enumerate(rows):
        try:
            result.append(row | {"answers": annotator_answers(row, where(i))} if public else row)
        except UserError as error:
            result.append(error)
        except TypeError:  # `|` of a row that is already a UserError
            result.append(row)
    return result


def score_open_answers(
    task: Task, records: dict[int, Record], folder: Path, run: Record, scoring: Options
) -> Scored:
    """Accuracy, overall and by kind of answer if the questions have kinds; a malformed question scores 0."""
    questions: list[OpenQuestion] = task.truth
    texts = answer_texts(records)
    public = any(q.answers for q in questions)
    values = [
        (m4c_accuracy(texts[s.index], q.answers) if s.index in texts else 0.0) if public else None
        for s, q in zip(task.samples, questions)
    ]
    per_sample = [
        sample_record(s, records, value, _most_common(q.answers), q.kind, q.question)
        for s, q, value in zip(task.samples, questions, values)
    ]
    # without public answers only the submission file is useful
    if not public:
        return Scored({}, {}, per_sample)
    clusters = [cluster_of(s) for s in task.samples]
    metrics = {"accuracy": mean_metric(values, clusters)}  # pyright: ignore
    metrics |= mean_metrics_by("answer", [q.kind for q in questions], values, clusters)  # pyright: ignore
    return Scored(metrics, {}, per_sample)


def _most_common(answers: Sequence[str]) -> str | None:
    """The most frequent answer; ties go to the first."""
    return max(answers, key=answers.count) if answers else None
