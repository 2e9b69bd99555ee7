"""POPE: reader of the released JSON lines, and the yes/no metrics as the official evaluation counts them.

Scorers: `official` (default) reads any answer without a plain "no" or "not" as yes; `strict` accepts
"yes" and "no" alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from open_unitok.core.errors import UserError, did_you_mean
from open_unitok.core.files import existing, read_jsonl_lenient

from ..core.annotations import require_key, require_text
from ..core.records import mean

CATEGORIES = ("random", "popular", "adversarial")
SCORERS = ("official", "strict")


class Question(NamedTuple):
    """One yes/no question; `label` is "yes" or "no"."""

    question_id: int
    image: Path
    text: str
    label: str
    category: str
    malformed: str = ""  # why its line is malformed: it is not asked and counts as wrong


def load(data: str | Path) -> list[Question]:
    """Read `*_pope_{random,popular,adversarial}.json` from `data`, `data/test` or its `coco` folder.

    A line that lacks a key or has another label gives a question that is `broken`.

    Raises:
        UserError: a category is missing or there twice.
    """
    data = existing(data)
    folders = (data, data / "test", data / "coco")
    return [
        question
        for category in CATEGORIES
        for question in load_category(
            one_file([p for f in folders for p in f.glob(f"*_pope_{category}.json")], data, category)
        )
    ]


def in_order(questions: Sequence[Question], rows: Sequence[dict[str, Any]], path: Path) -> list[Question]:
    """The released questions in the order of LLaVA's rows, which name their category.

    Where a row has another question than the released file at that place, the question is `broken`.
    """
    left = {name: [q for q in questions if q.category == name] for name in CATEGORIES}
    result: list[Question] = []
    for i, row in enumerate(rows):
        where, question = f"{path}, line {i + 1}", None
        try:
            category = require_key(row, "category", where)
            if not left.get(category):
                raise UserError(f"{where}: the released files have no (more) question of {category!r}.")
            question = left[category].pop(0)
            if not question.malformed and Path(require_text(row, "image", where)).name != question.image.name:
                raise UserError(
                    f"{where}: image is {row['image']!r}, but the released file has {question.image.name!r} "
                    "at this place: the files are of different versions."
                )
        except UserError as error:
            # a line that cannot be read takes the place of one of the category that goes on here
            before = result[-1].category if result else CATEGORIES[0]
            if question is None and left[before]:
                question = left[before].pop(0)
            question = (question or unread(before))._replace(malformed=str(error))
        result.append(question)
    return result


def unread(category: str, reason: str = "") -> Question:
    """In the place of a malformed line: a yes that nothing finds, so that it can only lower a score."""
    return Question(-1, Path(), "", "yes", category, reason)


def columns(judged: Sequence[tuple[str, str, str]], names: Sequence[str]) -> np.ndarray:
    """(parsed, label, category) of M answers -> (M, 3 * C) TP, FP, FN per category of `names`."""
    result = np.zeros((len(judged), len(names), 3))
    for i, (parsed, label, category) in enumerate(judged):
        hit = (parsed == "yes" == label, parsed == "yes" != label, parsed != "yes" and label == "yes")
        result[i, names.index(category)] = hit
    return result.reshape(len(judged), -1)


def one_file(found: list[Path], data: Path, category: str) -> Path:
    """The only element of `found`."""
    if len(found) != 1:
        names = ", ".join(str(p) for p in found) or "nothing"
        raise UserError(f"{data}: expected one *_pope_{category}.json here or in test/, found {names}.")
    return found[0]


def load_category(path: Path) -> list[Question]:
    """The questions of one file, in its order."""
    category = path.stem.rsplit("_", 1)[1]
    places = [path.parent / "images", path.parent / "val2014", path.parent.parent / "val2014"]
    images = next((d for d in places if d.is_dir()), path.parent)
    result = []
    for i, row in enumerate(read_jsonl_lenient(path)):
        where = f"{path}, question {i + 1}"
        try:
            label = require_key(row, "label", where)
            if label not in ("yes", "no"):
                raise UserError(f"{where}: label is {label!r}; allowed: 'yes', 'no'.")
            image = images / Path(require_text(row, "image", where)).name
            text = require_text(row, "text", where)
            result.append(Question(require_key(row, "question_id", where), image, text, label, category))
        except UserError as error:
            result.append(unread(category, str(error)))
    return result


def parse(answer: str, scorer: str = "official") -> str:
    """ "yes" or "no"; the strict scorer also says "" where the answer is neither."""
    if scorer == "strict":
        word = answer.strip().lower()
        return word if word in ("yes", "no") else ""
    if scorer != "official":
        raise UserError(f"scorer is {scorer!r}." + did_you_mean(scorer, SCORERS))
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if any(word in ("No", "not", "no") for word in words) else "yes"


def score(questions: Sequence[Question], answers: dict[int, str], scorer: str = "official") -> dict[str, Any]:
    """Per category the counts and ratios, then their means over categories.

    `answers` maps a question's place in `questions` to the text (ids repeat from file to file). A missing
    answer counts as the wrong one, so that it can only lower a score.

    Raises:
        UserError: an answer for a place that does not exist.
    """
    if unknown := [i for i in answers if not 0 <= i < len(questions)]:
        raise UserError(
            f"{len(unknown)} answers belong to no question of POPE, for instance number {unknown[0]}."
        )
    parsed = [parse(answers[i], scorer) if i in answers else wrong(q.label) for i, q in enumerate(questions)]
    categories = {}
    for category in dict.fromkeys(q.category for q in questions):
        pairs = [(p, q.label) for p, q in zip(parsed, questions) if q.category == category]
        categories[category] = ratios(pairs)
    return {
        "per_category": categories,
        "f1": mean([c["f1"] for c in categories.values()]),
        "accuracy": mean([c["accuracy"] for c in categories.values()]),
        "parsed": parsed,
    }


def wrong(label: str) -> str:
    """The other one of yes and no."""
    return "no" if label == "yes" else "yes"


def ratios(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Counts and ratios of (answer, label) pairs, yes being positive; a ratio of nothing is 0."""
    tp, fp = pairs.count(("yes", "yes")), pairs.count(("yes", "no"))
    tn, fn = pairs.count(("no", "no")), pairs.count(("no", "yes"))
    precision, recall = ratio(tp, tp + fp), ratio(tp, tp + fn)
    return {
        "n": len(pairs), "TP": tp, "FP": fp, "TN": tn, "FN": fn,
        "accuracy": ratio(tp + tn, len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": ratio(2 * precision * recall, precision + recall),
        "yes_ratio": ratio(sum(p == "yes" for p, _ in pairs), len(pairs)),
    }  # fmt: skip


def ratio(part: float, whole: float) -> float:
    """part / whole, 0 of nothing."""
    return part / whole if whole else 0.0
