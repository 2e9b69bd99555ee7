"""DPG-Bench: dense prompts decomposed into yes/no questions, answered by a VQA model (arXiv 2403.05135)."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from open_unitok.core.errors import UserError
from open_unitok.core.text_files import numbered_csv

from ..core.annotations import require_key, require_mostly_valid, require_type
from ..core.benchmark import Metric, Options, Record, Sample, Scored, Task, malformed_sample
from ..core.bootstrap import bootstrap, mean_columns
from ..core.generated_images import generation_metadata, require_generated_images, save_generated_images
from ..core.judge_pass import run_judge_pass, samples_with_images
from ..core.release_files import RELEASES, find_file
from ..judges import vqa_model

_IMAGES_PER_PROMPT = 4
_PUBLISHED_JUDGE = "mPLUG-large"  # "model" in vqa_answers.jsonl of a comparable run
IMAGE_BATCH, QUESTION_BATCH = 4, 8  # of the judge pass
COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")


class DpgQuestion(NamedTuple):
    """A question about a prompt; `parents` are the numbers of questions it depends on (0 = none)."""

    number: int
    parents: tuple[int, ...]
    category: str  # "coarse - fine"
    text: str


class DpgItem(NamedTuple):
    """A prompt and its questions in the order of the file."""

    id: str
    prompt: str
    questions: tuple[DpgQuestion, ...]
    malformed: str = ""  # the error if the prompt is empty


def read_dpg_items(data: Path) -> tuple[list[DpgItem], list[str]]:
    """The prompts of `dpg_bench.csv`, and warnings about the file.

    A malformed line becomes a question that is skipped by the judge and counts as no; without an item_id it
    belongs to the prompt of the line before.

    Raises:
        UserError: a column is missing, or most lines are malformed.
    """
    path = find_file(data, RELEASES["dpg_bench"].original, "DPG-Bench table")
    prompts: dict[str, str] = {}
    questions: dict[str, list[DpgQuestion]] = defaultdict(list)
    name, bad, lines = "", [], 0
    for number, row in numbered_csv(path, columns=COLUMNS):
        # the released table repeats its header
        if row["item_id"] == "item_id":
            continue
        lines, name = lines + 1, (row["item_id"] or "").strip() or name
        # only the first line of a prompt has to hold its text
        prompts[name] = prompts.get(name) or (row["text"] or "").strip()
        try:
            question = _parse_question(row, f"{path}, line {number}")
            if question.number in (q.number for q in questions[name]):
                raise UserError(f"{path}, line {number}: question {question.number} occurs twice.")
        except UserError as error:
            bad.append(str(error))
            # a negative number: skipped by the judge, counts as no, depends on no question
            question = DpgQuestion(-len(bad), (), "", "")
        questions[name].append(question)
    # a few bad lines only lower the score; a majority means another file format
    if not lines or len(bad) > lines / 2:
        raise UserError(f"{path} is {f'not a table of questions: {bad[0]}' if bad else 'empty.'}")
    problems = [f"{len(bad)} questions are malformed, the first: {bad[0]} (counted as no)"] if bad else []
    return [
        DpgItem(i, text, tuple(questions[i]), "" if text else f"{path}: the prompt of {i!r} is empty.")
        for i, text in prompts.items()
    ], problems


def _parse_question(row: dict[str, str], where: str) -> DpgQuestion:
    """Parse one line of the table."""
    try:
        number = int(row["proposition_id"])
        parents = tuple(int(p) for p in row["dependency"].split(",") if p.strip())
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: proposition_id and dependency must be integers: {error}") from error
    if number < 1:
        raise UserError(f"{where}: proposition_id is {number}; it must be at least 1.")
    if not (row["item_id"] or "").strip() or not (row["question_natural_language"] or "").strip():
        raise UserError(f"{where}: item_id and question_natural_language must not be empty.")
    # "entity - whole (car)" -> "entity - whole"
    category = (row["tuple"] or "").split("(")[0].strip()
    return DpgQuestion(number, parents, category, row["question_natural_language"])


answer = save_generated_images


def load(data: Path, settings: Options) -> Task:
    """Four images per prompt."""
    items, problems = read_dpg_items(data)
    items = items[: settings.limit]
    per_prompt = settings.images_per_prompt or _IMAGES_PER_PROMPT
    samples, owners = [], []
    for k, item in enumerate(items):
        for j in range(per_prompt):
            n, name = k * per_prompt + j, f"{item.id}/{j}"
            if item.malformed:
                samples.append(malformed_sample(n, name, item.malformed))
            else:
                samples.append(Sample(n, name, item.prompt, None, "generate", settings.seed + n))
            owners.append(k)
    metadata = generation_metadata(settings, "png")
    metadata |= {"prompts": len(items), "images per prompt": per_prompt}
    truth = {"items": items, "owners": owners, "malformed": len(problems) > 0}
    return Task(require_mostly_valid(samples, data / "dpg_bench.csv"), truth, metadata, problems)


def judge(
    task: Task, records: dict[int, Record], out: Path, scoring: Options, device: str, quiet: bool
) -> None:
    """Judge pass: the VQA model answers every question about every image."""
    if not scoring.vqa_model:
        return
    model = vqa_model.VqaModel(scoring.vqa_model, device)

    def answer_images(batch: list[Sample], images: list[Any]) -> list[Record]:
        found: list[Record] = []
        for sample, image in zip(batch, images):
            item = task.truth["items"][task.truth["owners"][sample.index]]
            questions = [q for q in item.questions if q.number >= 0]
            texts: list[str] = []
            # a dense prompt has dozens of questions: bound the memory
            for start in range(0, len(questions), QUESTION_BATCH):
                piece = [q.text for q in questions[start : start + QUESTION_BATCH]]
                texts += model.answers([image] * len(piece), piece)
            found.append(
                {"answers": {str(q.number): _normalise(t) for q, t in zip(questions, texts)}, "raw": texts}
            )
        return found

    samples = samples_with_images(task.samples, records)
    run_judge_pass(out, "dpg", model.about, samples, records, answer_images, IMAGE_BATCH, quiet)


def _answers_of(record: Record, where: str) -> dict[str, str]:
    """Question number -> answer of a line of `vqa_answers.jsonl`."""
    answers = require_type(dict, require_key(record, "answers", where), f"{where}, answers")
    return {str(number): str(text) for number, text in answers.items()}


def raw_scores(questions: Sequence[DpgQuestion], answers: dict[str, str]) -> dict[int, float]:
    """1 for the exact string "yes", else 0, by question number; 0 without an answer."""
    return {q.number: float(q.number >= 0 and answers.get(str(q.number)) == "yes") for q in questions}


def image_score(questions: Sequence[DpgQuestion], answers: dict[str, str]) -> float:
    """The mean over questions; a question scores 0 if one of its parents does, or is missing."""
    scores = raw_scores(questions, answers)
    for question in questions:
        # in file order, as published: a parent that follows its child still has its raw score here
        if any(scores.get(p, 0.0) == 0 for p in question.parents if p != 0):
            scores[question.number] = 0.0
    return float(np.mean([scores[q.number] for q in questions]))


def category_scores(
    items: Sequence[DpgItem], last: Sequence[dict[str, str]]
) -> dict[str, dict[str, list[float]]]:
    """Raw scores by coarse (l1) and fine (l2) category; `last`: answers about each prompt's last image."""
    levels: dict[str, dict[str, list[float]]] = {"l1": defaultdict(list), "l2": defaultdict(list)}
    # raw: the published script does not propagate parents into the categories
    for item, answers in zip(items, last):
        raw = raw_scores(item.questions, answers)
        for question in item.questions:
            if not question.category:  # malformed
                continue
            levels["l1"][question.category.split("-")[0].strip()].append(raw[question.number])
            levels["l2"][question.category].append(raw[question.number])
    return levels


def score(
    task: Task, records: dict[int, Record], folder: Path, run: dict[str, Any], scoring: Options
) -> Scored:
    """100 x the mean over prompts of the mean over images; an image without answers counts as 0."""
    require_generated_images(task, records, folder)
    items: list[DpgItem] = task.truth["items"]
    owners = task.truth["owners"]
    found, by, problems = vqa_model.read_vqa_findings(
        task, records, folder, "dpg", "answers", "vqa_answers.jsonl", _answers_of
    )
    values = [
        image_score(items[owners[s.index]].questions, found[s.index])
        if s.index in found and not s.malformed
        else 0.0
        for s in task.samples
    ]
    per_prompt = task.metadata["images per prompt"]
    # average the images of each prompt first, so that all prompts have the same weight
    means = [float(np.mean(values[k * per_prompt : (k + 1) * per_prompt])) for k in range(len(items))]
    # prompts are the independent units: their images are not
    interval = bootstrap(mean_columns(100 * np.array(means)))
    metrics = {"dpg": Metric(100 * float(np.mean(means)), len(items), interval, "points")}
    # the published script overwrites the answers image by image: its categories see the last image only
    last = [found.get((k + 1) * per_prompt - 1, {}) for k in range(len(items))]
    metrics |= _category_metrics(items, last)
    missing = sum(s.index not in found for s in task.samples)
    problems = problems + [f"{missing} images have no answers (counted as 0)"] * (missing > 0)
    # mPLUG-large is not in transformers: its answers can only come from vqa_answers.jsonl
    reasons = [f"answers by {by}, not by {_PUBLISHED_JUDGE}"] * (by != _PUBLISHED_JUDGE)
    reasons += ["questions are malformed"] * task.truth["malformed"]
    reasons += [f"{missing} images have no answers"] * (missing > 0)
    return Scored(metrics, {"vqa model": by, "categories": "answers about the last image, as published"}, [
        {
            "index": s.index, "id": s.id, "prompt": s.prompt, "file": records.get(s.index, {}).get("file"),
            "score": 100 * value, "cluster": items[owners[s.index]].id,
        }
        for s, value in zip(task.samples, values)
    ], not_comparable="; ".join(reasons), problems=problems)  # fmt: skip


def _category_metrics(items: Sequence[DpgItem], last: Sequence[dict[str, str]]) -> dict[str, Metric]:
    """The mean score of each category."""
    # intervals resample prompts: questions about one image are not independent
    pooled: dict[str, tuple[list[float], list[str]]] = defaultdict(lambda: ([], []))
    for item, answers in zip(items, last):
        for level, groups in category_scores([item], [answers]).items():
            for name, scores in groups.items():
                pooled[f"{level}/{name}"][0].extend(scores)
                pooled[f"{level}/{name}"][1].extend([item.id] * len(scores))
    metrics = {}
    for name, (scores, prompts) in sorted(pooled.items()):
        points = 100 * np.array(scores)
        interval = bootstrap(mean_columns(points), prompts)
        metrics[name] = Metric(float(points.mean()), len(points), interval, "points")
    return metrics


def _normalise(text: str) -> str:
    """Lower case, without surrounding blanks and closing punctuation."""
    return re.sub(r"[\s.!,]+$", "", text.strip().lower())
