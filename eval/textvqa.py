"""TextVQA and VizWiz: ten answers per question, normalised as the M4C/EvalAI processor does.

The published TextVQA numbers are of prompts that hold the words that an OCR system read ("ocr", the default);
without them (`--recipe short`) a score is some ten points lower.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from open_unitok.errors import UserError
from open_unitok.files import read_json

from .asking import (
    OCR,
    RECIPES,
    about_asking,
    answered,
    entry,
    find_file,
    image_in,
    layout_of,
    read_llava,
    recipe_for,
    stem_in,
    ten_answers,
    text_of,
)
from .harness import Row, Sample, Scored, Scoring, Settings, Task
from .rows import cluster_of, sample_row, share, shares_by, write_submission
from .vqa_text import normalise_m4c

SCORERS = ("m4c",)
ORIGINAL, LLAVA = ("TextVQA_0.5.1_*.json",), ("*textvqa*.jsonl",)
OCR_FILE = "TextVQA_Rosetta_OCR_v0.2_{}.json"
VIZWIZ_ORIGINAL, VIZWIZ_LLAVA = (
    ("val.json", "test.json", "train.json", "Annotations/*.json"),
    ("llava_*.jsonl",),
)


class Question(NamedTuple):
    """A question and its ten answers; none where they are not public."""

    question_id: Any
    question: str
    answers: tuple[str, ...] = ()
    kind: str = ""  # VizWiz: yes/no, number, other, unanswerable


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Leave-one-out accuracy over the answers, both sides normalised."""
    return of_normalised(normalise_m4c(prediction), tuple(map(normalise_m4c, answers)))


@functools.lru_cache(maxsize=100_000)
def of_normalised(prediction: str, answers: tuple[str, ...]) -> float:
    """The mean over annotators of min(1, matches among the others / 3)."""
    matches, total = answers.count(prediction), len(answers)
    return (matches * min(1.0, (matches - 1) / 3) + (total - matches) * min(1.0, matches / 3)) / total


# --------------------------------------------------------------------------------------------------- TextVQA


def load(data: Path, settings: Settings) -> Task:
    """One sample per question of `TextVQA_0.5.1_{split}.json`, or of LLaVA's question file."""
    layout = layout_of(data, settings, ORIGINAL, LLAVA)
    path = find_file(data, ORIGINAL, "TextVQA annotation file", settings.split, "_val.")
    split = path.stem.removeprefix("TextVQA_0.5.1_")
    folders = [data / name for name in ("train_images", "test_images", "images")]
    rows = entry(read_json(path), "data", path)
    for i, row in enumerate(rows):
        for key in ("question_id", "image_id"):
            entry(row, key, f"{path}, data[{i}]")
        text_of(row, "question", f"{path}, data[{i}]")
    if layout == "llava":
        return load_llava(data, settings, path, rows, folders, split)
    recipe = recipe_for(settings, "ocr", more=("ocr",))
    tokens = ocr_tokens(data, split, rows) if recipe == "ocr" else {}
    samples, questions = [], []
    for i, row in enumerate(rows[: settings.limit]):
        text = RECIPES[recipe].format(row["question"]) if recipe != "ocr" else with_ocr(row, tokens)
        samples.append(Sample(i, row["question_id"], text, stem_in(folders, row["image_id"]), "ask"))
        questions.append(question_of(row, f"{path}, data[{i}]"))
    return Task(samples, questions, about_asking(split, recipe, settings))


def question_of(row: Row, where: str) -> Question:
    """An entry of the annotation file; test sets have no answers."""
    return Question(row["question_id"], row["question"], ten_answers(row, where) if "answers" in row else ())


def with_ocr(row: Row, tokens: dict[str, list[str]]) -> str:
    """The published prompt: the question, the words read in the picture, what kind of answer is wanted."""
    return OCR.format(row["question"], ", ".join(tokens.get(row["image_id"], ())))


def ocr_tokens(data: Path, split: str, rows: Sequence[Row]) -> dict[str, list[str]]:
    """Image id -> the words that Rosetta read, from the release's file or from the rows themselves."""
    if all("ocr_tokens" in row for row in rows):
        return {row["image_id"]: row["ocr_tokens"] for row in rows}
    path = data / OCR_FILE.format(split)
    if not path.exists():
        raise UserError(
            f"{path} does not exist: the published prompt holds OCR words. Put it there, or leave them "
            "out with --recipe short, which scores some ten points lower."
        )
    return {
        entry(row, "image_id", f"{path}, data[{i}]"): entry(row, "ocr_tokens", f"{path}, data[{i}]")
        for i, row in enumerate(entry(read_json(path), "data", path))
    }


def load_llava(
    data: Path, settings: Settings, path: Path, rows: list[Row], folders: list[Path], split: str
) -> Task:
    """LLaVA's file, whose question ids are image ids: joined by image and question, as its scorer does."""
    file = find_file(data, LLAVA, "LLaVA question file", settings.split)
    places = {(str(row["image_id"]), row["question"].lower()): i for i, row in enumerate(rows)}
    samples, questions = [], []
    for i, asked in enumerate(read_llava(file, settings.limit)):
        where = f"{file}, line {i + 1}"
        key = (str(asked["question_id"]), question_in(asked["text"], where))
        if key not in places:
            raise UserError(f"{where}: {path.name} has no question {key[1]!r} about image {key[0]}.")
        row = rows[places[key]]
        image = image_in(folders, Path(asked["image"]).name) if "image" in asked else None
        image = image or stem_in(folders, row["image_id"])
        samples.append(Sample(i, row["question_id"], asked["text"], image, "ask"))
        questions.append(question_of(row, where))
    return Task(samples, questions, about_asking(split, f"as in {file.name}", settings))


def question_in(prompt: str, where: str) -> str:
    """The bare question, in lower case, of one of the four prompt layouts that circulate."""
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: ") and "Question: " in prompt and " Short answer:" in prompt:
        return prompt.split("Question: ")[1].split(" Short answer:")[0].lower()
    if "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    if len(lines) == 2:
        return lines[0].lower()
    raise UserError(f"{where}: the prompt has none of the known layouts: {prompt!r}.")


def score(task: Task, rows: dict[int, Row], folder: Path, run: dict[str, Any], scoring: Scoring) -> Scored:
    """Accuracy, and per kind of answer where the questions have kinds."""
    questions: list[Question] = task.truth
    texts = answered(rows)
    public = [q for q in questions if q.answers]
    values = [
        (accuracy(texts[s.index], q.answers) if s.index in texts else 0.0) if q.answers else None
        for s, q in zip(task.samples, questions)
    ]
    per_sample = [
        sample_row(s, rows, v, most_common(q.answers), q.kind, q.question)
        for s, q, v in zip(task.samples, questions, values)
    ]
    if not public:
        return Scored({}, {}, per_sample)
    if len(public) < len(questions):
        raise UserError(f"{len(questions) - len(public)} of {len(questions)} questions have no answers.")
    clusters = [cluster_of(s) for s in task.samples]
    metrics = {"accuracy": share(values, clusters)}
    metrics |= shares_by("answer", [q.kind for q in questions], values, clusters)
    return Scored(metrics, {}, per_sample)


def most_common(answers: Sequence[str]) -> str | None:
    """The most frequent answer, of several the first."""
    return max(answers, key=answers.count) if answers else None


def submit(task: Task, rows: dict[int, Row], folder: Path, data: Path) -> list[Path]:
    """TextVQA's challenge file."""
    texts = answered(rows)
    content = [{"question_id": s.id, "answer": normalise_m4c(texts.get(s.index, ""))} for s in task.samples]
    return [write_submission(folder, "textvqa_answers.json", content)]


# ---------------------------------------------------------------------------------------------------- VizWiz


def load_vizwiz(data: Path, settings: Settings) -> Task:
    """One sample per entry of `{split}.json`, or of LLaVA's question file; ids are file names."""
    layout = layout_of(data, settings, VIZWIZ_ORIGINAL, VIZWIZ_LLAVA)
    known: dict[str, tuple[Row, str]] = {}
    split = settings.split or ("val" if layout == "original" else "test")
    file = None
    if layout == "original" or any(next(data.glob(p), None) for p in VIZWIZ_ORIGINAL):
        file = find_file(data, VIZWIZ_ORIGINAL, "VizWiz annotation file", settings.split, f"{split}.json")
        for i, row in enumerate(read_rows(file)):
            where = f"{file}, entry {i + 1}"
            text_of(row, "question", where)
            known[entry(row, "image", where)] = row, where
    folders = [data / name for name in (file.stem if file else split, split, "images")] + [data]
    recipe = recipe_for(settings, "unanswerable")
    asked = [(name, RECIPES[recipe].format(row["question"])) for name, (row, _) in known.items()]
    if layout == "llava":
        path = find_file(data, VIZWIZ_LLAVA, "LLaVA question file", settings.split, split)
        recipe = f"as in {path.name}"
        asked = [
            (Path(entry(row, "image", f"{path}, line {i + 1}")).name, row["text"])
            for i, row in enumerate(read_llava(path))
        ]
    samples, questions = [], []
    for i, (name, prompt) in enumerate(asked[: settings.limit]):
        row, where = known.get(name, ({"question": prompt.split("\n")[0]}, ""))
        samples.append(Sample(i, name, prompt, image_in(folders, name), "ask"))
        answers = ten_answers(row, where) if "answers" in row else ()
        questions.append(Question(name, row["question"], answers, str(row.get("answer_type", ""))))
    return Task(samples, questions, about_asking(file.stem if file else split, recipe, settings))


def read_rows(path: Path) -> list[Row]:
    """A JSON list of objects."""
    rows = read_json(path)
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of questions, found {type(rows).__name__}.")
    return rows


def submit_vizwiz(task: Task, rows: dict[int, Row], folder: Path, data: Path) -> list[Path]:
    """VizWiz' challenge file."""
    texts = answered(rows)
    content = [{"image": s.id, "answer": normalise_m4c(texts.get(s.index, ""))} for s in task.samples]
    return [write_submission(folder, "vizwiz_answers.json", content)]
