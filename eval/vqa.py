"""VQAv2: reader of the released JSON pair, and the accuracy in the three forms that circulate.

Scorers: `lmms` (default) normalises prediction and all answers; `official` is the first public evaluation
(answers lose their punctuation only, and only where the ten differ); `gated` normalises both sides where the
ten answers differ and compares raw strings where they agree.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from open_unitok.errors import UserError, did_you_mean
from open_unitok.files import existing, read_json

from .asking import entry, ten_answers, text_of
from .vqa_text import normalise, one_line, strip_punctuation

SCORERS = ("lmms", "official", "gated")


class Question(NamedTuple):
    """One question with its ten answers; `answers` is empty for splits whose answers are not public."""

    question_id: int
    image_id: int | str
    question: str
    image: Path
    answers: tuple[str, ...] = ()
    question_type: str = ""
    answer_type: str = ""
    common_answer: str = ""
    held_out: bool = False  # scenes: the picture shows a colour x shape pair that training never does


def load(data: str | Path, split: str | None = None) -> list[Question]:
    """Read `v2_OpenEnded_*_questions.json` and its annotations from `data` or `data/test`.

    Args:
        split: the file's middle part (for instance `mscoco_val2014`), needed only where several are there.

    Raises:
        UserError: no file or several, a missing key, a question without its annotation; the place is named.
    """
    path = find_questions(data, split)
    content = read_json(path)
    rows = entry(content, "questions", path)
    subtype = str(content.get("data_subtype", ""))
    annotations = read_annotations(
        path.with_name(path.name.replace("OpenEnded_", "").replace("questions", "annotations"))
    )
    locate = image_locator(path.parent, subtype)
    result, seen = [], set()
    for i, row in enumerate(rows):
        where = f"{path}, questions[{i}]"
        question_id, image_id = entry(row, "question_id", where), entry(row, "image_id", where)
        for name, value in (("question_id", question_id), ("image_id", image_id)):
            if not isinstance(value, int):
                raise UserError(f"{where}: {name} is {value!r}; it must be a whole number.")
        if question_id in seen:
            raise UserError(f"{where}: question_id {question_id} occurs twice; every question needs its own.")
        seen.add(question_id)
        question = Question(question_id, image_id, text_of(row, "question", where), locate(image_id))
        if annotations is not None:
            if question_id not in annotations:
                raise UserError(
                    f"{where}: question_id {question_id} has no annotation; questions and annotations differ."
                )
            question = question._replace(**annotations[question_id])
        result.append(question)
    if annotations is not None and (unknown := annotations.keys() - seen):
        raise UserError(
            f"{path}: the annotations name question ids that are no questions, for instance {min(unknown)}."
        )
    return result


def find_questions(data: str | Path, split: str | None) -> Path:
    """The one question file in `data` or `data/test`."""
    data = existing(data)
    found = sorted(
        p for folder in (data, data / "test") for p in folder.glob("v2_OpenEnded_*_questions.json")
    )
    if split is not None:
        found = [p for p in found if p.name == f"v2_OpenEnded_{split}_questions.json"]
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "nothing"
        raise UserError(
            f"{data}: expected one v2_OpenEnded_{split or '*'}_questions.json here or in test/, "
            f"found {names}." + (" Choose one with --split." if found else "")
        )
    return found[0]


def read_annotations(path: Path) -> dict[int, dict[str, Any]] | None:
    """Question id -> the fields of its annotation; None without such a file (test-dev keeps its answers)."""
    if not path.exists():
        return None
    result = {}
    for i, row in enumerate(entry(read_json(path), "annotations", path)):
        where = f"{path}, annotations[{i}]"
        texts = ten_answers(row, where)
        result[entry(row, "question_id", where)] = {
            "answers": texts,
            "question_type": entry(row, "question_type", where),
            "answer_type": entry(row, "answer_type", where),
            "common_answer": str(row.get("multiple_choice_answer") or Counter(texts).most_common(1)[0][0]),
            "held_out": bool(row.get("held_out", False)),
        }
    return result


def image_locator(folder: Path, subtype: str):
    """A function image_id -> path: COCO's names for COCO's splits, `{subtype}_{id}.png` for others."""
    first = next((d for d in (folder / "images", folder / subtype) if d.is_dir()), folder)
    coco = f"COCO_{subtype.replace('test-dev2015', 'test2015')}"

    def locate(image_id: int) -> Path:
        if subtype.startswith(("train20", "val20", "test")):
            return first / f"{coco}_{image_id:012d}.jpg"
        return first / f"{subtype}_{image_id:012d}.png"

    return locate


# ---------------------------------------------------------------------------------------------------- scoring


def accuracy(prediction: str, answers: Sequence[str], scorer: str = "lmms") -> float:
    """Leave-one-out accuracy: the mean over annotators of min(1, matches among the others / 3)."""
    if scorer not in SCORERS:
        raise UserError(f"scorer is {scorer!r}." + did_you_mean(scorer, SCORERS))
    if scorer == "lmms":
        prediction, answers = normalise(prediction, "m4c"), [normalise(a, "m4c") for a in answers]
    else:
        differ = len(set(answers)) > 1
        if scorer == "official":
            prediction, answers = (
                normalise(prediction),
                [strip_punctuation(a) if differ else a for a in answers],
            )
        elif differ:
            prediction, answers = normalise(prediction), [normalise(a) for a in answers]
        else:
            prediction = one_line(prediction)
    matches, total = sum(answer == prediction for answer in answers), len(answers)
    # The matching annotators see one match less than the others.
    return (matches * min(1.0, (matches - 1) / 3) + (total - matches) * min(1.0, matches / 3)) / total


def score(questions: Sequence[Question], predictions: dict[int, str], scorer: str = "lmms") -> dict[str, Any]:
    """Accuracies in [0, 1]: overall, per answer type, question type and question; a missing answer scores 0.

    `constant` holds, per question type, the type's most frequent answer and what it would score: what a model
    blind to the picture reaches.

    Raises:
        UserError: a prediction for a question id that does not exist, or questions without public answers.
    """
    unknown = predictions.keys() - {q.question_id for q in questions}
    if unknown:
        raise UserError(
            f"{len(unknown)} answers belong to no question of this split, for instance id {min(unknown)}."
        )
    if any(not q.answers for q in questions):
        raise UserError(
            "This split has no public answers: upload the answers file to the challenge server instead."
        )
    values = [
        accuracy(predictions[q.question_id], q.answers, scorer) if q.question_id in predictions else 0.0
        for q in questions
    ]
    constant = constant_answers(questions)
    blind = [accuracy(constant[q.question_type], q.answers, scorer) for q in questions]
    blind_by_type = mean_by(zip([q.question_type for q in questions], blind))
    return {
        "overall": mean(values),
        "per_answer_type": mean_by(zip([q.answer_type for q in questions], values)),
        "per_question_type": mean_by(zip([q.question_type for q in questions], values)),
        "per_question": values,
        "constant": {t: {"answer": constant[t], "accuracy": blind_by_type[t]} for t in blind_by_type},
        "constant_overall": mean(blind),
    }


def constant_answers(questions: Iterable[Question]) -> dict[str, str]:
    """Question type -> the answer that most of its questions have (the alphabet decides a tie)."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for question in questions:
        counts[question.question_type][question.common_answer] += 1
    return {t: min(c, key=lambda answer: (-c[answer], answer)) for t, c in counts.items()}


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean, 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def mean_by(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Group -> mean of its values, groups in alphabetical order."""
    groups: dict[str, list[float]] = defaultdict(list)
    for group, value in pairs:
        groups[group].append(value)
    return {group: mean(groups[group]) for group in sorted(groups)}
