"""DPG-Bench: dense prompts taken apart into questions, which a VQA model answers about every drawing."""

import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from open_unitok.errors import UserError
from open_unitok.files import existing, read_jsonl

from .asking import entry, read_picture
from .drawn import about_drawing, require_drawings
from .harness import Metric, Row, Sample, Scored, Scoring, Settings, Task
from .intervals import bootstrap, with_ones
from .looks import look_all, looked, with_pictures
from .vqascore import stem

PICTURES = 4
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


def load_items(data: Path) -> list[Item]:
    """Read `dpg_bench.csv`; a repeated header is passed over, no question is.

    Raises:
        UserError: a column is missing, or a number is none; the line is named.
    """
    path = existing(data / "dpg_bench.csv", "DPG-Bench is this table.")
    prompts: dict[str, str] = {}
    questions: dict[str, list[Question]] = defaultdict(list)
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if lacking := [c for c in COLUMNS if c not in (reader.fieldnames or ())]:
            raise UserError(f"{path} has no column {lacking[0]!r}.")
        for row in reader:
            if row["item_id"] == "item_id":
                continue
            prompts.setdefault(row["item_id"], row["text"])
            questions[row["item_id"]].append(question_of(row, f"{path}, line {reader.line_num}"))
    if not prompts:
        raise UserError(f"{path} is empty.")
    return [Item(i, text, tuple(questions[i])) for i, text in prompts.items()]


def question_of(row: dict[str, str], where: str) -> Question:
    """One line of the table."""
    try:
        number = int(row["proposition_id"])
        parents = tuple(int(p) for p in row["dependency"].split(",") if p.strip())
    except (ValueError, AttributeError) as error:
        raise UserError(f"{where}: proposition_id and dependency must be whole numbers: {error}") from error
    return Question(number, parents, row["tuple"].split("(")[0].strip(), row["question_natural_language"])


def load_dpg(data: Path, settings: Settings) -> Task:
    """Four drawings per prompt."""
    items = load_items(data)[: settings.limit]
    each = settings.images_per_prompt or PICTURES
    samples, owners = [], []
    for k, item in enumerate(items):
        for j in range(each):
            place = k * each + j
            samples.append(Sample(place, f"{item.id}/{j}", item.prompt, None, "draw", settings.seed + place))
            owners.append(k)
    about = about_drawing(settings, "png") | {"prompts": len(items), "pictures per prompt": each}
    return Task(samples, {"items": items, "owners": owners}, about)


def look_dpg(task: Task, rows: dict[int, Row], out: Path, scoring: Scoring, device: str, quiet: bool) -> None:
    """Ask the VQA model every question about every drawing."""
    if not scoring.vqa_model:
        return
    from .vqa_model import VqaModel

    model = VqaModel(scoring.vqa_model, device)

    def work(batch: list[Sample]) -> list[Row]:
        found: list[Row] = []
        for sample in batch:
            picture = read_picture(out / rows[sample.index]["file"])
            questions = task.truth["items"][task.truth["owners"][sample.index]].questions
            texts: list[str] = []
            for start in range(0, len(questions), 8):
                piece = [q.text for q in questions[start : start + 8]]
                texts += model.answers([picture] * len(piece), piece)
            found.append(
                {"answers": {str(q.number): stem(t) for q, t in zip(questions, texts)}, "raw": texts}
            )
        return found

    look_all(out, "dpg", model.about, with_pictures(task.samples, rows), work, 4, quiet)


def read_answers(task: Task, rows: dict[int, Row], folder: Path) -> tuple[dict[int, dict[str, str]], str]:
    """Answers by index, and whose: `vqa_answers.jsonl` ({"index", "answers": {number: text}}) comes first."""
    path = folder / "vqa_answers.jsonl"
    if path.exists():
        found, names = {}, set()
        for k, row in enumerate(read_jsonl(path)):
            where = f"{path}, line {k + 1}"
            names.add(str(row.get("model", "a model without a name")))
            found[entry(row, "index", where)] = {
                str(n): str(t) for n, t in entry(row, "answers", where).items()
            }
        return found, ", ".join(sorted(names))
    seen = looked(folder, "dpg", with_pictures(task.samples, rows))
    if seen is None:
        raise UserError(
            f"{folder}: the pictures are drawn, but nothing has been asked about them. Run again with "
            f"--vqa-model FOLDER (nothing is drawn again), or write another model's answers to {path}."
        )
    return {i: row["answers"] for i, row in seen[0].rows.items()}, seen[1]["model"]


def raw_scores(questions: Sequence[Question], answers: dict[str, str]) -> dict[int, float]:
    """1 for the very string "yes", else 0, by question number; what was not answered is 0."""
    return {q.number: float(answers.get(str(q.number)) == "yes") for q in questions}


def picture_score(questions: Sequence[Question], answers: dict[str, str]) -> float:
    """The mean over questions; one whose parent stands at 0 when its turn comes is 0, in the file's order."""
    scores = raw_scores(questions, answers)
    for question in questions:
        if any(scores.get(p, 1.0) == 0 for p in question.parents if p != 0):
            scores[question.number] = 0.0
    return float(np.mean([scores[q.number] for q in questions]))


def categories(items: Sequence[Item], last: Sequence[dict[str, str]]) -> dict[str, dict[str, list[float]]]:
    """Scores by coarse and fine category: plain answers about each prompt's last picture, pooled."""
    levels: dict[str, dict[str, list[float]]] = {"l1": defaultdict(list), "l2": defaultdict(list)}
    for item, answers in zip(items, last):
        raw = raw_scores(item.questions, answers)
        for question in item.questions:
            levels["l1"][question.category.split("-")[0].strip()].append(raw[question.number])
            levels["l2"][question.category].append(raw[question.number])
    return levels


def score_dpg(
    task: Task, rows: dict[int, Row], folder: Path, run: dict[str, Any], scoring: Scoring
) -> Scored:
    """100 x the mean over prompts of the mean over pictures; a picture without answers counts as 0."""
    require_drawings(task, rows, folder)
    items: list[Item] = task.truth["items"]
    owners = task.truth["owners"]
    found, by = read_answers(task, rows, folder)
    values = [
        picture_score(items[owners[s.index]].questions, found[s.index]) if s.index in found else 0.0
        for s in task.samples
    ]
    each = task.about["pictures per prompt"]
    by_prompt = [float(np.mean(values[k * each : (k + 1) * each])) for k in range(len(items))]
    interval = bootstrap(with_ones(100 * np.array(by_prompt)))
    metrics = {"dpg": Metric(100 * float(np.mean(by_prompt)), len(items), interval, "points")}
    last = [found.get(k * each + each - 1, {}) for k in range(len(items))]
    for level, groups in categories(items, last).items():
        for name, scores in sorted(groups.items()):
            metrics[f"{level}/{name}"] = Metric(100 * float(np.mean(scores)), len(scores), None, "points")
    missing = sum(s.index not in found for s in task.samples)
    return Scored(metrics, {"vqa model": by, "categories": "answers about the last picture, as published"}, [
        {
            "index": s.index, "id": s.id, "prompt": s.prompt, "file": rows.get(s.index, {}).get("file"),
            "score": 100 * value, "cluster": items[owners[s.index]].id,
        }
        for s, value in zip(task.samples, values)
    ], not_comparable="" if by == PUBLISHED else f"answers by {by}, not by {PUBLISHED}",
       problems=[f"{missing} drawings have no answers (counted as 0)"] * (missing > 0))  # fmt: skip
