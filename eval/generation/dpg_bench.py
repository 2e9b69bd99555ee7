"""DPG-Bench: dense prompts taken apart into questions, which a VQA model answers about every drawing."""

import csv
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing

from ..core.annotations import require_key, require_mostly_valid, require_type
from ..core.bootstrap import bootstrap, mean_columns
from ..core.generated_images import generation_metadata, require_generated_images
from ..core.harness import Metric, Record, Sample, Scored, Scoring, Settings, Task, malformed_sample
from ..core.judge_pass import (
    ExternalFindings,
    judge_findings,
    read_external_findings,
    read_judge_pass,
    run_judge_pass,
    samples_with_images,
)

IMAGES = 4
PUBLISHED = "mPLUG-large"  # what vqa_answers.jsonl has to say to be comparable
COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")


class Question(NamedTuple):
    """A question about a prompt, the questions that it depends on (0 = none), and its category."""

    number: int
    parents: tuple[int, ...]
    category: str  # the finer one; what stands before " - " is the coarser one
    text: str


class Item(NamedTuple):
    """A prompt and its questions in the file's order."""

    id: str
    prompt: str
    questions: tuple[Question, ...]
    malformed: str = ""  # why there is no prompt


def load_items(data: Path) -> tuple[list[Item], list[str]]:
    """Read `dpg_bench.csv`, and what is wrong with it; a repeated header is passed over, no question is.

    A malformed line is a question that is never asked and counts as no; its prompt, where it names none, is
    that of the line before.

    Raises:
        UserError: a column is missing, or most lines are malformed.
    """
    path = existing(data / "dpg_bench.csv", "DPG-Bench is this table.")
    prompts: dict[str, str] = {}
    questions: dict[str, list[Question]] = defaultdict(list)
    name, bad, lines = "", [], 0
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file)
        if lacking := [c for c in COLUMNS if c not in (reader.fieldnames or ())]:
            raise UserError(f"{path} has no column {lacking[0]!r}.")
        for row in reader:
            if row["item_id"] == "item_id":
                continue
            lines, name = lines + 1, (row["item_id"] or "").strip() or name
            prompts[name] = prompts.get(name) or (row["text"] or "").strip()
            try:
                question = question_of(row, f"{path}, line {reader.line_num}")
                if question.number in (q.number for q in questions[name]):
                    raise UserError(
                        f"{path}, line {reader.line_num}: question {question.number} occurs twice."
                    )
            except UserError as error:
                bad.append(str(error))
                question = Question(-len(bad), (), "", "")
            questions[name].append(question)
    if not lines or len(bad) > lines / 2:
        raise UserError(f"{path} is {f'no table of questions: {bad[0]}' if bad else 'empty.'}")
    problems = [f"{len(bad)} questions are malformed, the first: {bad[0]} (counted as no)"] if bad else []
    return [
        Item(i, text, tuple(questions[i]), "" if text else f"{path}: the prompt of {i!r} is empty.")
        for i, text in prompts.items()
    ], problems


def question_of(row: dict[str, str], where: str) -> Question:
    """One line of the table."""
    try:
        number = int(row["proposition_id"])
        parents = tuple(int(p) for p in row["dependency"].split(",") if p.strip())
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: proposition_id and dependency must be whole numbers: {error}") from error
    if number < 1:
        raise UserError(f"{where}: proposition_id is {number}; it must be above 0.")
    if not (row["item_id"] or "").strip() or not (row["question_natural_language"] or "").strip():
        raise UserError(f"{where}: item_id and question_natural_language must not be empty.")
    category = (row["tuple"] or "").split("(")[0].strip()
    return Question(number, parents, category, row["question_natural_language"])


def load_dpg(data: Path, settings: Settings) -> Task:
    """Four drawings per prompt."""
    items, problems = load_items(data)
    items = items[: settings.limit]
    each = settings.images_per_prompt or IMAGES
    samples, owners = [], []
    for k, item in enumerate(items):
        for j in range(each):
            place = k * each + j
            sample = Sample(place, f"{item.id}/{j}", item.prompt, None, "generate", settings.seed + place)
            samples.append(
                malformed_sample(place, f"{item.id}/{j}", item.malformed) if item.malformed else sample
            )
            owners.append(k)
    about = generation_metadata(settings, "png") | {"prompts": len(items), "images per prompt": each}
    truth = {"items": items, "owners": owners, "malformed": len(problems) > 0}
    return Task(require_mostly_valid(samples, data / "dpg_bench.csv"), truth, about, problems)


def look_dpg(
    task: Task, rows: dict[int, Record], out: Path, scoring: Scoring, device: str, quiet: bool
) -> None:
    """Ask the VQA model every question about every drawing."""
    if not scoring.vqa_model:
        return
    from ..judges.vqa_model import VqaModel

    model = VqaModel(scoring.vqa_model, device)

    def work(batch: list[Sample], images: list[Any]) -> list[Record]:
        found: list[Record] = []
        for sample, image in zip(batch, images):
            item = task.truth["items"][task.truth["owners"][sample.index]]
            questions = [q for q in item.questions if q.number >= 0]
            texts: list[str] = []
            for start in range(0, len(questions), 8):
                piece = [q.text for q in questions[start : start + 8]]
                texts += model.answers([image] * len(piece), piece)
            found.append(
                {"answers": {str(q.number): stem(t) for q, t in zip(questions, texts)}, "raw": texts}
            )
        return found

    run_judge_pass(out, "dpg", model.about, samples_with_images(task.samples, rows), rows, work, 4, quiet)


def answers_in(row: Record, where: str) -> dict[str, str]:
    """The answers of a line of `vqa_answers.jsonl` by the question's number."""
    answers = require_type(dict, require_key(row, "answers", where), f"{where}, answers")
    return {str(number): str(text) for number, text in answers.items()}


def read_answers(task: Task, rows: dict[int, Record], folder: Path) -> ExternalFindings:
    """Answers, and whose: `vqa_answers.jsonl` ({"index", "answers": {number: text}}) comes first."""
    path = folder / "vqa_answers.jsonl"
    if path.exists():
        return read_external_findings(path, task.samples, answers_in, "model", "a model without a name")
    seen = read_judge_pass(folder, "dpg", samples_with_images(task.samples, rows))
    if seen is None:
        raise UserError(
            f"{folder}: the images are drawn, but nothing has been asked about them. Run again with "
            f"--vqa-model FOLDER (nothing is drawn again), or write another model's answers to {path}."
        )
    found, problems = judge_findings(seen[0])
    return ExternalFindings({i: row["answers"] for i, row in found.items()}, seen[1]["model"], problems)


def raw_scores(questions: Sequence[Question], answers: dict[str, str]) -> dict[int, float]:
    """1 for the very string "yes", else 0, by question number; what was not answered or asked is 0."""
    return {q.number: float(q.number >= 0 and answers.get(str(q.number)) == "yes") for q in questions}


def image_score(questions: Sequence[Question], answers: dict[str, str]) -> float:
    """The mean over questions; one whose parent stands at 0 when its turn comes is 0, in the file's order.

    A parent that is not there, since its line is malformed, stands at 0.
    """
    scores = raw_scores(questions, answers)
    for question in questions:
        if any(scores.get(p, 0.0) == 0 for p in question.parents if p != 0):
            scores[question.number] = 0.0
    return float(np.mean([scores[q.number] for q in questions]))


def categories(items: Sequence[Item], last: Sequence[dict[str, str]]) -> dict[str, dict[str, list[float]]]:
    """Scores by coarse and fine category: plain answers about each prompt's last image, pooled."""
    levels: dict[str, dict[str, list[float]]] = {"l1": defaultdict(list), "l2": defaultdict(list)}
    for item, answers in zip(items, last):
        raw = raw_scores(item.questions, answers)
        for question in item.questions:
            if not question.category:  # malformed
                continue
            levels["l1"][question.category.split("-")[0].strip()].append(raw[question.number])
            levels["l2"][question.category].append(raw[question.number])
    return levels


def score_dpg(
    task: Task, rows: dict[int, Record], folder: Path, run: dict[str, Any], scoring: Scoring
) -> Scored:
    """100 x the mean over prompts of the mean over images; an image without answers counts as 0."""
    require_generated_images(task, rows, folder)
    items: list[Item] = task.truth["items"]
    owners = task.truth["owners"]
    found, by, problems = read_answers(task, rows, folder)
    values = [
        image_score(items[owners[s.index]].questions, found[s.index])
        if s.index in found and not s.malformed
        else 0.0
        for s in task.samples
    ]
    each = task.metadata["images per prompt"]
    by_prompt = [float(np.mean(values[k * each : (k + 1) * each])) for k in range(len(items))]
    interval = bootstrap(mean_columns(100 * np.array(by_prompt)))
    metrics = {"dpg": Metric(100 * float(np.mean(by_prompt)), len(items), interval, "points")}
    last = [found.get(k * each + each - 1, {}) for k in range(len(items))]
    pooled: dict[str, tuple[list[float], list[str]]] = defaultdict(lambda: ([], []))
    for item, answers in zip(items, last):
        for level, groups in categories([item], [answers]).items():
            for name, scores in groups.items():
                pooled[f"{level}/{name}"][0].extend(scores)
                pooled[f"{level}/{name}"][1].extend([item.id] * len(scores))
    for name, (scores, owned_by) in sorted(pooled.items()):
        points = 100 * np.array(scores)
        interval = bootstrap(mean_columns(points), owned_by)
        metrics[name] = Metric(float(points.mean()), len(points), interval, "points")
    missing = sum(s.index not in found for s in task.samples)
    problems = problems + [f"{missing} drawings have no answers (counted as 0)"] * (missing > 0)
    why = "" if by == PUBLISHED else f"answers by {by}, not by {PUBLISHED}"
    why = why or "questions are malformed" * task.truth["malformed"]
    return Scored(metrics, {"vqa model": by, "categories": "answers about the last image, as published"}, [
        {
            "index": s.index, "id": s.id, "prompt": s.prompt, "file": rows.get(s.index, {}).get("file"),
            "score": 100 * value, "cluster": items[owners[s.index]].id,
        }
        for s, value in zip(task.samples, values)
    ], not_comparable=why, problems=problems)  # fmt: skip


def stem(text: str) -> str:
    """An answer as yes-or-no scorers read it: lower case, without blanks and closing punctuation."""
    return re.sub(r"[\s.!,]+$", "", text.strip().lower())
