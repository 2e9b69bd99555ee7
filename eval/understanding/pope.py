"""POPE (arXiv 2305.10355): object hallucination; mean F1 of "yes" over three ways to sample absent objects.

Scorers: `official` (default) counts any answer without the words "no" or "not" as yes; `strict` accepts only
"yes" and "no".
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from open_unitok.core.errors import UserError, did_you_mean
from open_unitok.core.text_files import read_json_lines

from ..core.annotations import (
    llava_ids,
    read_llava_questions,
    require_key,
    require_mostly_valid,
    require_text,
)
from ..core.answering import (
    PROMPT_TEMPLATES,
    PUBLISHED_LENGTH,
    SCENES_LENGTH,
    answer_questions,
    answer_texts,
    answering_metadata,
    choose_prompt_template,
)
from ..core.benchmark import Metric, Options, Record, Sample, Scored, Task, malformed_sample
from ..core.bootstrap import bootstrap, f1_columns, f1_statistic, mean_columns
from ..core.parquet import ParquetImage, choose_split, find_splits, read_parquet, row_image
from ..core.records import cluster_of, mean, sample_record
from ..core.release_files import (
    RELEASES,
    detect_layout,
    find_file,
    find_files,
    image_finder,
    image_folders,
)

POPE_SUBSETS = ("random", "popular", "adversarial")
POPE_SCORERS = ("official", "strict")
_ALL = "all three"  # the split of results
_ORIGINAL, _LLAVA = RELEASES["pope"].original, RELEASES["pope"].llava

answer = answer_questions


class PopeQuestion(NamedTuple):
    """One yes/no question; `label` is "yes" or "no"."""

    question_id: int
    image: Path | ParquetImage
    text: str
    label: str
    category: str
    malformed: str = ""  # the error in its line: the question is not answered and counts as wrong


# --------------------------------------------------------------------------------------------------- loading


def load(data: Path, settings: Options) -> Task:
    """One sample per question, category by category; in LLaVA's layout in the order of LLaVA's file."""
    layout = detect_layout(data, settings, _ORIGINAL, _LLAVA)
    if layout != "llava":
        read = read_pope if layout == "original" else read_pope_parquet
        questions = _require_categories(read(data, settings.split), data)[: settings.limit]
        template = choose_prompt_template(settings, "short", data)
        prompts, path = [PROMPT_TEMPLATES[template].format(q.text) for q in questions], data
        split, problems = _describe_set(data, settings.split) if layout == "original" else (_ALL, [])
        aliases = []
        length = SCENES_LENGTH if template == "plain" else PUBLISHED_LENGTH
        metadata = answering_metadata(split, template, settings, length)
    else:
        path = find_file(data, _LLAVA, "LLaVA question file")
        rows = read_llava_questions(path)
        released = _require_categories(read_pope(data, settings.split), data)
        questions, problems = _join_llava(released, rows, path)
        questions = questions[: settings.limit]
        prompts = [row["text"] if isinstance(row, dict) else "" for row in rows]
        aliases = llava_ids(rows)
        metadata = answering_metadata(_ALL, f"as in {path.name}", settings)
    samples = [
        malformed_sample(i, None, q.malformed)
        if q.malformed
        else Sample(i, f"{q.category}/{q.question_id}", prompt, q.image)
        for i, (q, prompt) in enumerate(zip(questions, prompts))
    ]
    return Task(require_mostly_valid(samples, path), questions, metadata, problems, aliases)


def read_pope(data: str | Path, split: str | None = None) -> list[PopeQuestion]:
    """Read `*_pope_{random,popular,adversarial}.json` from `data` or folders below it.

    A line without a key or with an invalid label becomes a `malformed` question.

    Args:
        split: as for `find_set`.

    Raises:
        UserError: the file of a category is missing, or there are two.
    """
    return [question for file in find_set(Path(data), split) for question in _read_category(Path(data), file)]


def find_set(data: Path, split: str | None) -> list[Path]:
    """The files of the three categories of one set of questions; the release has three sets side by side.

    Args:
        split: coco, aokvqa or gqa; None = that of `data` if it is a file, else coco, else the only one.

    Raises:
        UserError: a file is missing, or there are two.
    """
    if split is None and data.is_file() and data.suffix == ".json":
        split = _set_of(data)
    files = []
    for category in POPE_SUBSETS:
        every = find_files(data, (f"*_pope_{category}.json",), in_others=True)  # a set is called gqa
        # the papers report COCO
        found = [p for p in every if _set_of(p) == (split or "coco")] or ([] if split else every)
        # a copy deeper down does not count
        found = [p for p in found if len(p.parts) == len(found[0].parts)]
        if len(found) != 1 or _set_of(found[0]) != _set_of((files or found)[0]):
            names = ", ".join(str(p) for p in found or every) or "nothing"
            wanted = f"{split or (_set_of(files[0]) if files else '*')}_pope_{category}.json"
            raise UserError(f"{data}: expected one {wanted} here or in a folder below, found {names}.")
        files += found
    return files


def _set_of(file: Path) -> str:
    """The name of a file's set of questions."""
    return file.name.rpartition("_pope_")[0]


def _describe_set(data: Path, split: str | None) -> tuple[str, list[str]]:
    """The split of the result, and a line about sets of questions that are not asked."""
    own = _set_of(find_set(data, split)[0])
    others = sorted({_set_of(path) for path in find_files(data, _ORIGINAL, in_others=True)} - {own})
    note = f"only the questions of {own} are asked; for those of {' or '.join(others)} see --split"
    # scenes have a set of their own
    return _ALL + f" of {own}" * (own in ("aokvqa", "gqa")), [note] * bool(others)


def _require_categories(questions: list[PopeQuestion], data: Path) -> list[PopeQuestion]:
    """The questions; UserError if a category has none or is mostly malformed: F1 is a mean over three."""
    for category in POPE_SUBSETS:
        own = [q for q in questions if q.category == category]
        malformed = [q.malformed for q in own if q.malformed]
        if not own:
            raise UserError(f"{data}: there are no questions of the category {category}.")
        if 2 * len(malformed) > len(own):
            raise UserError(
                f"{data}: {len(malformed)} of {len(own)} questions of the category {category} are malformed, "
                f"so it seems to be another kind of file. The first: {malformed[0]}"
            )
    return questions


def _read_category(data: Path, path: Path) -> list[PopeQuestion]:
    """The questions of one file, in order."""
    category = path.stem.rsplit("_", 1)[1]
    find_image = image_finder(image_folders(data, path, ("images", "val2014")))
    result = []
    for i, row in enumerate(read_json_lines(path, lenient=True)):
        where = f"{path}, question {i + 1}"
        # the image is checked when it is read: here only the line itself
        try:
            result.append(_read_question(row, where, category, find_image))
        except UserError as error:
            result.append(_malformed_question(category, str(error)))
    return result


def _read_question(
    row: Record, where: str, category: str, image: ParquetImage | Callable[[str], Path]
) -> PopeQuestion:
    """A question of the released file; `image` is its image, or finds it by its name.

    Raises:
        UserError: a key is missing or the label is invalid.
    """
    label = require_key(row, "label", where)
    if label not in ("yes", "no"):
        raise UserError(f"{where}: label is {label!r}; allowed: 'yes', 'no'.")
    if not isinstance(image, ParquetImage):
        image = image(Path(require_text(row, "image", where)).name)  # pyright: ignore
    number = require_key(row, "question_id", where)
    return PopeQuestion(number, image, require_text(row, "text", where), label, category)  # pyright: ignore


def read_pope_parquet(data: Path, split: str | None = None) -> list[PopeQuestion]:
    """The questions of the hub's table (`lmms-lab/POPE`), in the order of `read_pope`.

    Raises:
        UserError: the table lacks one of the three categories.
    """
    splits = [choose_split(data, split)] if split else find_splits(data)
    # the table exists twice: as one split, and as one split per category
    whole = [split for split in splits if split.split not in POPE_SUBSETS]
    files = choose_split(data, split, ("test",)).files if whole else [f for s in splits for f in s.files]
    result: dict[str, list[PopeQuestion]] = {category: [] for category in POPE_SUBSETS}
    for row in read_parquet(
        files, ("question_id", "question", "answer", "image_source", "image", "category")
    ):
        category = str(row["category"])
        if category not in result:
            raise UserError(f"{row['#']}: category is {category!r}; allowed: {', '.join(POPE_SUBSETS)}.")
        released = row | {"label": str(row["answer"]).lower(), "text": row["question"]}
        try:
            image = row_image(row, f"{Path(str(row['image_source'])).stem}.jpg")
            result[category].append(_read_question(released, row["#"], category, image))
        except UserError as error:
            result[category].append(_malformed_question(category, str(error)))
    if absent := [category for category, questions in result.items() if not questions]:
        raise UserError(f"{data}: there are no questions of the categories {', '.join(absent)}.")
    return [question for questions in result.values() for question in questions]


def _malformed_question(category: str, reason: str = "") -> PopeQuestion:
    """The placeholder of a malformed line."""
    # label "yes": a missing answer is then a false negative, which lowers F1
    return PopeQuestion(-1, Path(), "", "yes", category, reason)


def _join_llava(
    questions: Sequence[PopeQuestion], rows: Sequence[Any], path: Path
) -> tuple[list[PopeQuestion], list[str]]:
    """The released question of each of LLaVA's rows, and a warning about those that no row asks.

    Rows have no released id: they are joined by category, image and question, since the releases differ in
    order and number. A row without a released question is `malformed`.
    """
    left: dict[tuple[str, str, str], list[PopeQuestion]] = {}
    for q in questions:
        left.setdefault((q.category, q.image.name, _join_text(q.text)), []).append(q)
    result: list[PopeQuestion] = []
    for i, row in enumerate(rows):
        # an unreadable line counts in the category of the line before
        where, category = f"{path}, line {i + 1}", result[-1].category if result else POPE_SUBSETS[0]
        try:
            named = require_key(row, "category", where)
            category = named if named in POPE_SUBSETS else category
            image = Path(require_text(row, "image", where)).name
            text = row["text"].split("\n")[0]
            found = left.get((named, image, _join_text(text)))
            if not found:
                raise UserError(
                    f"{where}: the released {named!r} file has no question {text!r} about {image}: the files "
                    "are of different versions."
                )
            result.append(found.pop(0))
        except UserError as error:
            result.append(_malformed_question(category, str(error)))
    unasked = sum(map(len, left.values())) - sum(bool(q.malformed) for q in questions)
    return result, [f"{unasked} released questions are not in {path.name} (not asked)"] * (unasked > 0)


def _join_text(question: str) -> str:
    """The question as it is compared: old releases write "imange"."""
    return " ".join(question.lower().replace("imange", "image").split())


# --------------------------------------------------------------------------------------------------- scoring


def score(task: Task, records: dict[int, Record], folder: Path, run: Record, scoring: Options) -> Scored:
    """F1, accuracy, precision, recall and yes ratio: means over the categories, and of each category."""
    questions: list[PopeQuestion] = task.truth
    result = pope_metrics(questions, answer_texts(records), scoring.scorer)
    names = list(result["per_category"])
    judged = [(parsed, q.label, q.category) for parsed, q in zip(result["parsed"], questions)]
    # TP, FP, FN per sample, so that the bootstrap recomputes F1 itself instead of averaging it
    columns = f1_columns(judged, names)
    right = [float(parsed == q.label) for parsed, q in zip(result["parsed"], questions)]
    clusters = [cluster_of(s) for s in task.samples]
    metrics = {
        "f1": Metric(result["f1"], len(questions), bootstrap(columns, clusters, f1_statistic)),
        "accuracy": Metric(result["accuracy"], len(questions), bootstrap(mean_columns(right), clusters)),
    }
    categories = result["per_category"]
    for key in ("precision", "recall", "yes_ratio"):
        value = mean([ratios[key] for ratios in categories.values()])
        metrics[key.replace("_", " ")] = Metric(value, len(questions))
    for k, (name, ratios) in enumerate(categories.items()):
        interval = bootstrap(columns[:, 3 * k : 3 * k + 3], clusters, f1_statistic)
        metrics[f"f1/{name}"] = Metric(ratios["f1"], int(ratios["n"]), interval)
    # the papers report COCO
    other = str(task.metadata["split"]).partition(" of ")[2]
    reason = f"the questions are those of {other}, the published ones of coco" if other else ""
    for key in ("accuracy", "precision", "recall", "yes_ratio"):
        for name, ratios in categories.items():
            metrics[f"{key.replace('_', ' ')}/{name}"] = Metric(ratios[key], int(ratios["n"]))
    return Scored(metrics, {"per_category": result["per_category"]}, [
        sample_record(s, records, value, q.label, q.category, q.text, parsed=parsed)
        for s, q, value, parsed in zip(task.samples, questions, right, result["parsed"])
    ], "f1", reason)  # fmt: skip


def parse_yes_no(text: str, scorer: str = "official") -> str:
    """Returns "yes" or "no"; with the strict scorer also "" for any other answer."""
    if scorer == "strict":
        word = text.strip().lower()
        return word if word in ("yes", "no") else ""
    if scorer != "official":
        raise UserError(f"scorer is {scorer!r}." + did_you_mean(scorer, POPE_SCORERS))
    # published: the first sentence, without commas; "NO" in capitals is not a no
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if any(word in ("No", "not", "no") for word in words) else "yes"


def pope_metrics(
    questions: Sequence[PopeQuestion], answers: dict[int, str], scorer: str = "official"
) -> dict[str, Any]:
    """Counts and ratios per category, and the mean F1 and accuracy over categories.

    Args:
        answers: index in `questions` -> answer; a missing answer counts as the wrong one.

    Raises:
        UserError: an index is out of range.
    """
    if unknown := [i for i in answers if not 0 <= i < len(questions)]:
        raise UserError(
            f"{len(unknown)} answers belong to no question of POPE, for instance number {unknown[0]}."
        )
    parsed = [
        parse_yes_no(answers[i], scorer) if i in answers else ("no" if q.label == "yes" else "yes")
        for i, q in enumerate(questions)
    ]
    categories = {}
    for category in dict.fromkeys(q.category for q in questions):
        pairs = [(p, q.label) for p, q in zip(parsed, questions) if q.category == category]
        categories[category] = yes_no_ratios(pairs)
    return {
        "per_category": categories,
        "f1": mean([c["f1"] for c in categories.values()]),
        "accuracy": mean([c["accuracy"] for c in categories.values()]),
        "parsed": parsed,
    }


def yes_no_ratios(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Counts and ratios of (answer, label) pairs with positive class yes; a ratio with denominator 0 is 0."""
    tp, fp = pairs.count(("yes", "yes")), pairs.count(("yes", "no"))
    tn, fn = pairs.count(("no", "no")), pairs.count(("no", "yes"))
    precision, recall = _ratio(tp, tp + fp), _ratio(tp, tp + fn)
    return {
        "n": len(pairs), "TP": tp, "FP": fp, "TN": tn, "FN": fn,
        "accuracy": _ratio(tp + tn, len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": _ratio(sum(p == "yes" for p, _ in pairs), len(pairs)),
    }  # fmt: skip


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
