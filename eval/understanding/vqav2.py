"""VQAv2: reader of the released JSON pair, and the accuracy in the three forms that circulate.

Scorers: `lmms` (default) normalises prediction and all answers; `official` is the first public evaluation
(answers lose their punctuation only, and only where the ten differ); `gated` normalises both sides where the
ten answers differ and compares raw strings where they agree.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from open_unitok.core.errors import UserError, did_you_mean
from open_unitok.core.files import existing

from ..core.annotations import annotator_answers, read_json_as, require_key, require_text, require_type
from ..core.answer_normalisation import normalise, one_line, strip_punctuation
from ..core.records import mean, mean_by

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
    held_out: bool = False  # scenes: the image shows a colour x shape pair that training never does
    malformed: str = ""  # why its annotation is malformed: it is not asked and counts as wrong


def load(data: str | Path, split: str | None = None) -> list[Question]:
    """Read `v2_OpenEnded_*_questions.json` and its annotations from `data` or `data/test`.

    What is malformed, a question without its annotation and an annotation without its question stand in the
    list as questions that are `broken`.

    Args:
        split: the file's middle part (for instance `mscoco_val2014`), needed only where several are there.

    Raises:
        UserError: no file or several, or one that is of another kind.
    """
    path = find_questions(data, split)
    content = read_json_as(dict, path)
    rows = require_type(list, require_key(content, "questions", path), f"{path}, questions")
    notes = path.with_name(path.name.replace("OpenEnded_", "").replace("questions", "annotations"))
    annotations = read_annotations(notes)
    locate = image_locator(path.parent, str(content.get("data_subtype", "")))
    result: list[Question] = []
    seen: set[Any] = set()
    for i, row in enumerate(rows):
        try:
            question = read_question(row, f"{path}, questions[{i}]", locate, seen)
            if annotations is not None:
                question = annotated(question, annotations, f"{path}, questions[{i}]")
        except UserError as error:
            name = row.get("question_id") if isinstance(row, dict) else None
            question = Question(name, name, "", Path(), malformed=str(error))  # pyright: ignore[reportArgumentType]
        seen.add(question.question_id if isinstance(question.question_id, int) else None)
        result.append(question)
    for name in annotations or ():
        if name not in seen:
            reason = f"{notes}: question_id {name!r} is no question of {path.name}."
            result.append(Question(name, name, "", Path(), malformed=reason))
    return result


def read_question(row: Any, where: str, locate: Callable[[int], Path], seen: set[Any]) -> Question:
    """A question of the released file, without its answers; UserError says what is wrong with it."""
    question_id, image_id = require_key(row, "question_id", where), require_key(row, "image_id", where)
    for name, value in (("question_id", question_id), ("image_id", image_id)):
        if not isinstance(value, int):
            raise UserError(f"{where}: {name} is {value!r}; it must be a whole number.")
    if question_id in seen:
        raise UserError(f"{where}: question_id {question_id} occurs twice; every question needs its own.")
    return Question(question_id, image_id, require_text(row, "question", where), locate(image_id))


def annotated(question: Question, annotations: dict[int, dict[str, Any] | UserError], where: str) -> Question:
    """The question with its annotation; UserError where it has none or a malformed one."""
    note = annotations.get(question.question_id)
    if note is None:
        raise UserError(
            f"{where}: question_id {question.question_id} has no annotation: "
            "questions and annotations differ."
        )
    if isinstance(note, UserError):
        raise note
    return question._replace(**note)


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


def read_annotations(path: Path) -> dict[int, dict[str, Any] | UserError] | None:
    """Question id -> the fields of its annotation, or what is wrong with it.

    None without such a file (test-dev keeps its answers). An annotation without a readable id leaves its
    question without one.
    """
    if not path.exists():
        return None
    result: dict[int, dict[str, Any] | UserError] = {}
    for i, row in enumerate(read_json_as(list, path, "annotations")):
        where, name = f"{path}, annotations[{i}]", row.get("question_id") if isinstance(row, dict) else None
        if not isinstance(name, int):
            continue
        try:
            if name in result:
                raise UserError(f"{where}: question_id {name} occurs twice; which of the two is true?")
            result[name] = annotation_of(row, where)
        except UserError as error:
            result[name] = error
    return result


def annotation_of(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of `Question` that an annotation gives."""
    texts = annotator_answers(row, where)
    return {
        "answers": texts,
        "question_type": require_text(row, "question_type", where),
        "answer_type": require_text(row, "answer_type", where),
        "common_answer": str(row.get("multiple_choice_answer") or Counter(texts).most_common(1)[0][0]),
        "held_out": bool(row.get("held_out", False)),
    }


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

    A broken question scores 0 and has no type.

    `constant` holds, per question type, the type's most frequent answer and what it would score: what a model
    blind to the image reaches.

    Raises:
        UserError: a prediction for a question id that does not exist, or questions without public answers.
    """
    unknown = predictions.keys() - {q.question_id for q in questions}
    if unknown:
        raise UserError(
            f"{len(unknown)} answers belong to no question of this split, for instance id {min(unknown)}."
        )
    if any(not q.answers for q in questions if not q.malformed):
        raise UserError(
            "This split has no public answers: upload the answers file to the challenge server instead."
        )
    values = [
        accuracy(predictions[q.question_id], q.answers, scorer)
        if q.question_id in predictions and not q.malformed
        else 0.0
        for q in questions
    ]
    good = [q for q in questions if not q.malformed]
    kept = [v for q, v in zip(questions, values) if not q.malformed]
    constant = constant_answers(good)
    blind = [accuracy(constant[q.question_type], q.answers, scorer) for q in good]
    blind_by_type = mean_by(zip([q.question_type for q in good], blind))
    return {
        "overall": mean(values),
        "per_answer_type": mean_by(zip([q.answer_type for q in good], kept)),
        "per_question_type": mean_by(zip([q.question_type for q in good], kept)),
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
