"""MME: reader of the fourteen released folders, and the two totals over their tasks.

A task's score is 100 * (share of right answers + share of images with both answers right). Published tables
quote the sum over the ten perception tasks, at most 2000. Scorers: `official` (default) looks for yes and no
in the first four characters as they are; `lmms` strips blanks and periods first and takes a single y or n.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing

from ..core.annotations import (
    PROMPT_TEMPLATES,
    answer_texts,
    answering_metadata,
    choose_prompt_template,
    find_file,
    image_path_by_stem,
    read_llava_questions,
    require_mostly_valid,
    require_text,
)
from ..core.bootstrap import bootstrap
from ..core.harness import Metric, Record, Sample, Scored, Scoring, Settings, Task, malformed_sample
from ..core.records import cluster_of, sample_record, write_submission

SCORERS = ("official", "lmms")
PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TASKS = (*PERCEPTION, *COGNITION)
ASK = "Please answer yes or no."
LLAVA = ("llava_mme*.jsonl", "*mme*.jsonl")
RELEASE = "MME_Benchmark_release_version"


class Question(NamedTuple):
    """A question with its truth, "yes" or "no"."""

    task: str
    image: Path
    question: str
    label: str
    malformed: str = ""  # why its line is malformed: it is not asked and counts as wrong


def load(data: Path, settings: Settings) -> Task:
    """Two samples per image, task by task; `split` picks a single task.

    In LLaVA's layout its file gives the prompts, and the released folders beside it the truth. A line that is
    no question with Yes or No gives a question that is `broken`, and so does an image's missing second one.

    Raises:
        UserError: a task's folder is missing or holds no questions.
    """
    root = data / RELEASE if (data / RELEASE).is_dir() else existing(data)
    tasks = (settings.split,) if settings.split else TASKS
    for name in tasks:
        if name not in TASKS:
            raise UserError(f"split is {name!r}; allowed: {', '.join(TASKS)}.")
    questions = [question for name in tasks for question in read_task(root, name)]
    template = choose_prompt_template(settings, "short")
    prompts = [PROMPT_TEMPLATES[template].format(bare(q.question)) for q in questions]
    if settings.layout == "llava":
        file = find_file(data, LLAVA[:1], "LLaVA question file")
        template = f"as in {file.name}"
        questions, prompts = joined(questions, file, tasks)
    questions, prompts = questions[: settings.limit], prompts[: settings.limit]
    samples = [
        malformed_sample(i, f"{q.task}/{q.image.name}", q.malformed, q.image if q.image.name else None)
        if q.malformed
        else Sample(i, f"{q.task}/{q.image.name}", prompt, q.image, "ask")
        for i, (q, prompt) in enumerate(zip(questions, prompts))
    ]
    return Task(
        require_mostly_valid(samples, root),
        questions,
        answering_metadata(settings.split or "all tasks", template, settings),
    )


def read_task(root: Path, name: str) -> list[Question]:
    """The questions of one folder: flat, or `images/` beside `questions_answers_YN/`."""
    folder = existing(root / name, f"MME has a folder for each of its tasks: {', '.join(TASKS)}.")
    texts = folder / "questions_answers_YN" if (folder / "questions_answers_YN").is_dir() else folder
    images = [folder / "images", folder]
    result = []
    for path in sorted(texts.glob("*.txt")):
        text = path.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        image = image_path_by_stem(images, path.stem)
        for i, line in enumerate(lines):
            question, tab, label = line.rpartition("\t")
            broken = ""
            if not tab or label.strip().lower() not in ("yes", "no") or not question.strip():
                broken = f"{path}, line {i + 1}: expected a question, a tab and Yes or No: {line!r}."
            elif i > 1:
                broken = f"{path}: expected two questions, found {len(lines)}."
            result.append(Question(name, image, question, label.strip().lower(), broken))
        for _ in range(len(lines), 2):
            result.append(
                Question(name, image, "", "", f"{path}: expected two questions, found {len(lines)}.")
            )
    if not result:
        raise UserError(f"{texts}: found no questions (*.txt).")
    return result


def bare(question: str) -> str:
    """A released question without its call for yes or no, which stands behind one blank or two."""
    return question.replace(ASK, "").strip()


def joined(questions: list[Question], file: Path, tasks: tuple[str, ...]) -> tuple[list[Question], list[str]]:
    """The released questions in the order of LLaVA's file, and its prompts.

    A line whose question is not released, or that cannot be read, counts as wrong in its task; without one in
    the first.
    """
    known = {(q.task, q.image.stem, bare(q.question)): q for q in questions}
    found, prompts = [], []
    for i, row in enumerate(read_llava_questions(file)):
        where, name, image = f"{file}, line {i + 1}", tasks[0], Path()
        try:
            image = Path(require_text(row, "image", where))
            name = next((part for part in (row.get("category"), image.parts[0]) if part in TASKS), name)
            if require_text(row, "category", where) not in TASKS:
                raise UserError(f"{where}: category is {row['category']!r}; allowed: {', '.join(TASKS)}.")
            key = (name, image.stem, row["text"].split("\n")[0].strip())
            if name in tasks and key not in known:
                raise UserError(f"{where}: the folder {name} has no such question about {key[1]}.")
            question, prompt = known.get(key), row["text"]
        except UserError as error:
            question, prompt = Question(name, image, "", "", str(error)), ""
        if name in tasks and question is not None:
            found.append(question)
            prompts.append(prompt)
    return found, prompts


# --------------------------------------------------------------------------------------------------- scoring


def parse(answer: str, scorer: str = "official") -> str:
    """ "yes", "no" or "other", which is always wrong."""
    text = answer.lower()
    if scorer == "lmms":
        text = text.strip().replace(".", "")
        if text in ("y", "n"):
            return "yes" if text == "y" else "no"
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def columns(rows: list[Record]) -> np.ndarray:
    """M rows with "group" (the task), "score" and "pair" (are both right) -> (M, 4 * T) for `total`."""
    names = list(dict.fromkeys(row["group"] for row in rows))
    images: dict[tuple[str, str], int] = {}
    for row in rows:
        key = row["group"], row["cluster"]
        images[key] = images.get(key, 0) + 1
    result = np.zeros((len(rows), len(names), 4))
    for i, row in enumerate(rows):
        part = 1 / images[row["group"], row["cluster"]]
        result[i, names.index(row["group"])] = row["score"], 1, row["pair"] * part, part
    return result.reshape(len(rows), -1)


def total(sums: np.ndarray) -> np.ndarray:
    """(..., 4 * T) sums -> the sum over tasks of 100 * (accuracy + accuracy+)."""
    right, count, both, images = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 4), -1, 0)
    parts = right / np.maximum(count, 1e-12) + both / np.maximum(images, 1e-12)
    return 100 * parts.sum(axis=-1)


def score(task: Task, rows: dict[int, Record], folder: Path, run: dict[str, Any], scoring: Scoring) -> Scored:
    """The perception total, the cognition total, and every task's score with its parts in the details."""
    questions: list[Question] = task.truth
    texts = answer_texts(rows)
    parsed = [parse(texts[s.index], scoring.scorer) if s.index in texts else "missing" for s in task.samples]
    right = [float(p == q.label) for p, q in zip(parsed, questions)]
    pairs: dict[tuple[str, str], list[float]] = {}
    for s, q, hit in zip(task.samples, questions, right):
        pairs.setdefault((q.task, cluster_of(s)), []).append(hit)
    # an image that has lost one of its two questions is not right twice
    both = {key: min(hits) if len(hits) > 1 else 0.0 for key, hits in pairs.items()}
    per_sample = [
        sample_record(
            s, rows, hit, q.label, q.task, q.question, parsed=p, pair=both[q.task, cluster_of(s)]
        )
        for s, q, hit, p in zip(task.samples, questions, right, parsed)
    ]  # fmt: skip

    def metric(names: tuple[str, ...]) -> Metric | None:
        chosen = [row for row in per_sample if row["group"] in names]
        if not chosen:
            return None
        sums, clusters = columns(chosen), [(row["group"], row["cluster"]) for row in chosen]
        return Metric(float(total(sums.sum(axis=0))), len(chosen), bootstrap(sums, clusters, total), "points")

    parts = {"perception": PERCEPTION, "cognition": COGNITION} | {f"task/{name}": (name,) for name in TASKS}
    metrics = {name: found for name, names in parts.items() if (found := metric(names))}
    return Scored(metrics, {"tasks": per_task(per_sample)}, per_sample, "mme")


def per_task(rows: list[Record]) -> dict[str, Record]:
    """Task -> score, accuracy, accuracy+, unreadable answers and images."""
    result = {}
    for name in dict.fromkeys(row["group"] for row in rows):
        chosen = [row for row in rows if row["group"] == name]
        right, count, both, images = columns(chosen).sum(axis=0)
        result[name] = {
            "score": 100 * (right / count + both / images),
            "acc": right / count, "acc_plus": both / images,
            "other": sum(row["parsed"] == "other" for row in chosen), "images": round(images),
        }  # fmt: skip
    return result


def submit(task: Task, rows: dict[int, Record], folder: Path, data: Path) -> list[Path]:
    """The official tool's input: per task a file of image, question, truth and answer."""
    texts = answer_texts(rows)
    lines: dict[str, list[str]] = {}
    for sample, question in zip(task.samples, task.truth):
        if question.malformed:
            continue
        answer = " ".join(texts.get(sample.index, "").split())
        fields = (question.image.name, question.question, question.label.capitalize(), answer)
        lines.setdefault(question.task, []).append("\t".join(fields) + "\n")
    return [write_submission(folder, f"{name}.txt", "".join(rows)) for name, rows in lines.items()]
