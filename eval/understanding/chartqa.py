"""ChartQA (arXiv 2203.10244): questions about charts, by people and generated from captions.

Relaxed accuracy: a number may differ by 5 %, anything else must be equal except for case.
"""

from pathlib import Path
from typing import Any, NamedTuple

from open_unitok.core.errors import UserError

from ..core.annotations import read_json_as, require_key, require_mostly_valid, require_text
from ..core.answering import (
    PROMPT_TEMPLATES,
    answer_questions,
    answer_texts,
    answering_metadata,
    choose_prompt_template,
)
from ..core.benchmark import Options, Record, Sample, Scored, Task, malformed_sample
from ..core.multiple_choice import other_size
from ..core.parquet import choose_split, holds_parquet, read_parquet
from ..core.records import cluster_of, mean_metric, mean_metrics_by, sample_record
from ..core.release_files import find_file, find_files, image_finder, image_folders, wrong_place

CHARTQA_SIZE = 2500  # the test split, half of it of either kind
_TOLERANCE = 0.05
_PROMPTS = {"lmms": "{}\nAnswer the question with a single word."}
_LENGTH = 16  # lmms-eval's longest answer in tokens
_SPLITS = ("test", "val", "train")


class ChartQuestion(NamedTuple):
    """A question about a chart; `kind` is "human" or "augmented"."""

    question: str
    answer: str
    kind: str


answer = answer_questions


def load(data: Path, settings: Options) -> Task:
    """One sample per question.

    Layouts: lmms-lab's or HuggingFaceM4's parquet files, or the release, `{split}_human.json`,
    `{split}_augmented.json` and `png/`.
    """
    template = choose_prompt_template(settings, "lmms", more=tuple(_PROMPTS))
    split, entries = _read_parquet(data, settings) if holds_parquet(data) else _read_release(data, settings)
    samples, questions = [], []
    for i, (row, where, kind, image) in enumerate(entries[: settings.limit]):
        try:
            question = _read_question(row, where, kind)
            if image is None:
                raise UserError(f"{where}: there is no image.")
            prompt = (PROMPT_TEMPLATES | _PROMPTS)[template].format(question.question)
            samples.append(Sample(i, f"{question.kind}/{i}", prompt, image))
        except UserError as error:
            question = ChartQuestion("", "", kind)
            samples.append(malformed_sample(i, None, error))
        questions.append(question)
    metadata = answering_metadata(split, template, settings, _LENGTH)
    return Task(require_mostly_valid(samples, data), questions, metadata)


def _read_parquet(data: Path, settings: Options) -> tuple[str, list[tuple[Any, str, str, Any]]]:
    """The split, and (row, place, kind, image) of each question of lmms-lab's or HuggingFaceM4's files."""
    split = choose_split(data, settings.split, ("test",))
    rows = read_parquet(split.files, ("image",))
    return split.split, [(row, row["#"], "", row["image"]) for row in rows]


def _read_release(data: Path, settings: Options) -> tuple[str, list[tuple[Any, str, str, Any]]]:
    """The split, and (row, place, kind, image) of each question of the release's two JSON files."""
    split = settings.split or "test"
    if split not in _SPLITS:
        raise UserError(f"split is {split!r}; allowed: {', '.join(_SPLITS)}.")
    names = tuple(f"{split}_{kind}.json" for kind in ("human", "augmented"))
    found = {name: find_files(data, (name,)) for name in names}
    if not any(found.values()):
        raise wrong_place(data, names)
    entries: list[tuple[Any, str, str, Any]] = []
    for name in names:
        file = find_file(data, (name,), "ChartQA question file")
        image_of = image_finder(image_folders(data, file, ("png",)))
        for i, row in enumerate(read_json_as(list, file)):
            image = row.get("imgname") if isinstance(row, dict) else None
            path = image_of(image) if isinstance(image, str) and image else None
            entries.append((row, f"{file}, entry {i}", name.split("_")[1].removesuffix(".json"), path))
    return split, entries


def _read_question(row: Any, where: str, kind: str) -> ChartQuestion:
    """A question in any of the layouts, whose columns differ in name."""
    keys = ("query", "label") if "query" in row else ("question", "answer")
    truth = require_key(row, keys[1], where)
    # HuggingFaceM4/ChartQA: a list of one
    truth = truth[0] if isinstance(truth, list) and truth else truth
    if not isinstance(truth, str | int | float) or str(truth) == "":
        raise UserError(f"{where}: {keys[1]} is {truth!r}; it must be a text.")
    if not kind:
        people = row.get("human_or_machine", row.get("type"))
        # lmms-lab: human_test and augmented_test; HuggingFaceM4: 0 and 1, or their names
        kind = "human" if people == 0 or str(people).startswith("human") else "augmented"
    return ChartQuestion(require_text(row, keys[0], where), str(truth), kind)


def score(task: Task, records: dict[int, Record], folder: Path, run: Record, scoring: Options) -> Scored:
    """Relaxed accuracy overall and of either kind of question; missing answers are wrong."""
    questions: list[ChartQuestion] = task.truth
    texts = answer_texts(records)
    values = [
        float(s.index in texts and relaxed_match(texts[s.index], q.answer)) if not s.malformed else 0.0
        for s, q in zip(task.samples, questions)
    ]
    clusters = [cluster_of(s) for s in task.samples]
    metrics = {"relaxed_accuracy": mean_metric(values, clusters)}
    metrics |= mean_metrics_by("kind", [q.kind for q in questions], values, clusters)
    per_sample = [
        sample_record(s, records, value, q.answer, q.kind, q.question)
        for s, q, value in zip(task.samples, questions, values)
    ]
    reason = "" if len(values) == CHARTQA_SIZE else other_size(len(values), CHARTQA_SIZE)
    return Scored(metrics, {}, per_sample, not_comparable=reason)


def relaxed_match(prediction: str, target: str) -> bool:
    """Whether an answer is correct; "35%" is 0.35, and a target of zero must be matched as a text."""
    prediction = prediction.strip()
    guess, truth = _number(prediction), _number(target)
    if guess is not None and truth:
        return abs(guess - truth) / abs(truth) <= _TOLERANCE
    return prediction.lower() == target.lower()


def _number(text: str) -> float | None:
    """The value of a number or a percentage, None for other texts."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
