"""SEED-Bench and ScienceQA: questions with lettered options, from files to samples, from answers to numbers.

SEED-Bench scorers: `official` (default) wants the letter alone, as LLaVA's scorer; `lmms` takes the first
character of the answer, whatever its case. ScienceQA: `official` (default) is LLaVA's parser, `lmms` takes
"A" or "A. ...".
"""

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from open_unitok.core.errors import UserError

from ..core.annotations import (
    PROMPT_TEMPLATES,
    answer_texts,
    answering_metadata,
    choose_prompt_template,
    detect_layout,
    find_file,
    image_path,
    image_path_by_stem,
    read_json_as,
    read_llava_questions,
    require_key,
    require_mostly_valid,
    require_text,
    require_type,
)
from ..core.harness import Record, Sample, Scored, Scoring, Settings, Task, malformed_sample
from ..core.records import (
    cluster_of,
    mean_metric,
    mean_metrics_by,
    sample_record,
    submittable,
    write_submission,
)

LETTERS = "ABCDE"
SEED_SCORERS = SQA_SCORERS = ("official", "lmms")
SEED_ORIGINAL, SEED_LLAVA = ("SEED-Bench.json",), ("*seed*.jsonl",)
SQA_ORIGINAL, SQA_LLAVA = ("problems.json",), ("llava_*CQM-A.json",)


class Question(NamedTuple):
    """A question with lettered options; `answer` is the right letter."""

    question_id: str
    question: str
    options: tuple[str, ...]
    answer: str
    kind: str  # SEED-Bench: the dimension; ScienceQA: the subject
    medium: str  # "image", "video" or "text"


def lettered(question: str, options: Sequence[str]) -> str:
    """The question with its options below, one a line."""
    return "\n".join([question, *(f"{letter}. {option}" for letter, option in zip(LETTERS, options))])


# ------------------------------------------------------------------------------------------------ SEED-Bench


def load_seedbench(data: Path, settings: Settings) -> Task:
    """One sample per question; a video stands as one frame, as LLaVA shows it. `split`: "image" or "video".

    Images: `SEED-Bench-image/{data_id}`; frames: `SEED-Bench-video-image/{question_id}.png`.
    """
    layout = detect_layout(data, settings, SEED_ORIGINAL, SEED_LLAVA)
    path = find_file(data, SEED_ORIGINAL, "SEED-Bench annotation file")
    if settings.split not in (None, "image", "video"):
        raise UserError(f"split is {settings.split!r}; allowed: image, video.")
    known = read_seeds(data, path)
    if layout == "llava":
        file = find_file(data, SEED_LLAVA, "LLaVA question file")
        template, asked = f"as in {file.name}", []
        for i, row in enumerate(read_llava_questions(file)):
            name = str(row["question_id"]) if isinstance(row, dict) else f"#{i}"
            unknown = UserError(f"{file}, line {i + 1}: question_id {name} is not in {path.name}.")
            question, image = known.get(name, (unread(name), unknown))
            if isinstance(row, UserError):
                image, row = row, {"text": ""}
            if not isinstance(image, UserError) and isinstance(row.get("image"), str):
                image = data / row["image"]
            asked.append((question, image, row["text"]))
    else:
        template, file = choose_prompt_template(settings, "letter"), path
        asked = [
            (q, image, PROMPT_TEMPLATES[template].format(lettered(q.question, q.options)))
            for q, image in known.values()
        ]
    # a malformed question whose medium cannot be read counts in either split
    asked = [row for row in asked if settings.split is None or row[0].medium in ("", settings.split)]
    samples = [
        malformed_sample(i, q.question_id, image)
        if isinstance(image, UserError)
        else Sample(i, q.question_id, prompt, image, "ask")
        for i, (q, image, prompt) in enumerate(asked[: settings.limit])
    ]
    about = answering_metadata(settings.split or "images and videos", template, settings)
    return Task(require_mostly_valid(samples, file), [q for q, _, _ in asked[: settings.limit]], about)


def unread(name: str, medium: str = "", kind: str = "") -> Question:
    """In the place of a malformed question."""
    return Question(name, "", (), "", kind, medium)


def read_seeds(data: Path, path: Path) -> dict[str, tuple[Question, Path | UserError]]:
    """Question id -> the question and its image, or in the image's place what is wrong with the entry."""
    types = read_json_as(dict, path, "question_type").items()
    kinds = {number: name for name, number in types if isinstance(number, str | int)}
    known: dict[str, tuple[Question, Path | UserError]] = {}
    for i, row in enumerate(read_json_as(list, path, "questions")):
        try:
            question, image = read_seed(row, f"{path}, questions[{i}]", kinds, data)
            if question.question_id in known:
                raise UserError(f"{path}, questions[{i}]: question_id {question.question_id} occurs twice.")
            known[question.question_id] = question, image
        except UserError as error:
            medium = row.get("data_type") if isinstance(row, dict) else ""
            known[f"#{i}"] = unread(f"#{i}", medium if medium in ("image", "video") else ""), error
    return known


def read_seed(row: Record, where: str, kinds: dict[int, str], data: Path) -> tuple[Question, Path]:
    """A question of `SEED-Bench.json` and its image or frame."""
    options = tuple(str(require_key(row, f"choice_{letter}", where)) for letter in "abcd")
    answer, name, medium = (
        require_key(row, "answer", where),
        str(require_key(row, "question_id", where)),
        row.get("data_type"),
    )
    if answer not in tuple("ABCD"):
        raise UserError(f"{where}: answer is {answer!r}; allowed: A, B, C, D.")
    if medium not in ("image", "video"):
        raise UserError(f"{where}: data_type is {medium!r}; allowed: image, video.")
    number = require_key(row, "question_type_id", where)
    kind = kinds.get(number) if isinstance(number, str | int) else None
    if kind is None:
        raise UserError(
            f"{where}: question_type_id is {row['question_type_id']!r}, which question_type lacks."
        )
    folder = data / ("SEED-Bench-image" if medium == "image" else "SEED-Bench-video-image")
    stem = str(require_key(row, "data_id", where)) if medium == "image" else name
    return Question(
        name, require_text(row, "question", where), options, answer, kind, medium
    ), image_path_by_stem([folder], stem)


def seed_right(text: str, answer: str, scorer: str = "official") -> bool:
    """Does the raw answer count?"""
    return text == answer if scorer == "official" else text.strip()[:1].upper() == answer


def score_seedbench(
    task: Task, rows: dict[int, Record], folder: Path, run: dict[str, Any], scoring: Scoring
) -> Scored:
    """Accuracy over all, images, videos and each dimension; a missing answer is wrong."""
    questions: list[Question] = task.truth
    texts = answer_texts(rows)
    values = [
        float(s.index in texts and seed_right(texts[s.index], q.answer, scoring.scorer))
        for s, q in zip(task.samples, questions)
    ]
    clusters = [cluster_of(s) for s in task.samples]
    metrics = {"accuracy": mean_metric(values, clusters)}
    metrics |= mean_metrics_by("medium", [q.medium for q in questions], values, clusters)
    metrics |= mean_metrics_by("type", [q.kind for q in questions], values, clusters)
    return Scored(metrics, {}, option_rows(task, rows, values))


def option_rows(task: Task, rows: dict[int, Record], values: Sequence[float], **more: Any) -> list[Record]:
    """A line per question, with its options."""
    return [
        sample_record(s, rows, value, q.answer, q.kind, lettered(q.question, q.options))
        for s, q, value in zip(task.samples, task.truth, values)
    ]


def submit_seedbench(task: Task, rows: dict[int, Record], folder: Path, data: Path) -> list[Path]:
    """The leaderboard's upload."""
    texts = answer_texts(rows)
    content = [{"question_id": s.id, "prediction": texts.get(s.index, "")} for s in submittable(task.samples)]
    return [write_submission(folder, "seedbench_predictions.jsonl", content)]


# ------------------------------------------------------------------------------------------------- ScienceQA


def load_scienceqa(data: Path, settings: Settings) -> Task:
    """One sample per problem of a split of `pid_splits.json` (default: test), with or without an image."""
    layout = detect_layout(data, settings, SQA_ORIGINAL, SQA_LLAVA)
    path = find_file(data, SQA_ORIGINAL, "ScienceQA problem file")
    problems, splits = read_json_as(dict, path), read_json_as(dict, data / "pid_splits.json")
    split = settings.split or "test"
    if split not in splits:
        raise UserError(f"split is {split!r}; {data / 'pid_splits.json'} has: {', '.join(splits)}.")
    require_type(list, splits[split], f"{data / 'pid_splits.json'}, {split}")
    file = path
    prompts: dict[str, str] = {}
    template = choose_prompt_template(settings, "letter")
    if layout == "llava":
        file = find_file(data, SQA_LLAVA, "LLaVA question file")
        prompts = {
            name: PROMPT_TEMPLATES[template].format(text) for name, text in read_conversations(file).items()
        }
    samples, questions = [], []
    for i, name in enumerate(map(str, splits[split][: settings.limit])):
        try:
            question, context, image = read_problem(problems, name, path, split)
            if layout == "llava" and name not in prompts:
                raise UserError(f"{file}: problem {name} of split {split} is missing or malformed.")
        except UserError as error:
            row = problems.get(name)
            medium = "image" if isinstance(row, dict) and row.get("image") else "text"
            samples.append(malformed_sample(i, name, error))
            questions.append(unread(name, medium))
            continue
        body = f"Context: {context or 'N/A'}\n{lettered(question.question, question.options)}"
        prompt = prompts.get(name) or PROMPT_TEMPLATES[template].format(body)
        samples.append(Sample(i, name, prompt, image, "ask"))
        questions.append(question)
    template = f"{template} after {file.name}" if layout == "llava" else template
    return Task(require_mostly_valid(samples, file), questions, answering_metadata(split, template, settings))


def read_conversations(path: Path) -> dict[str, str]:
    """Problem id -> the question of LLaVA's list of conversations, without its mark for the image.

    An entry without id or question is left out, and its problem is missed by `load_scienceqa`.
    """
    result = {}
    for row in read_json_as(list, path):
        with contextlib.suppress(UserError):
            turns = require_type(list, require_key(row, "conversations", path), path)
            text = require_text(turns[0] if turns else None, "value", path)
            result[str(require_key(row, "id", path))] = text.replace("<image>", "").strip()
    return result


def read_problem(problems: Any, name: str, path: Path, split: str) -> tuple[Question, str, Path | None]:
    """A problem, its context, and its image if it has one."""
    where = f"{path}, problem {name}"
    row = require_key(problems, name, path)
    options, answer = require_key(row, "choices", where), require_key(row, "answer", where)
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
        raise UserError(f"{where}: choices is {options!r}; expected a list of two to five.")
    if not isinstance(answer, int) or not 0 <= answer < len(options):
        raise UserError(
            f"{where}: answer is {answer!r}; it must be the place of one of {len(options)} choices."
        )
    image = None
    if row.get("image"):
        folders = [path.parent / split / name, path.parent / "images" / split / name, path.parent / name]
        image = image_path(folders, require_text(row, "image", where))
    medium, subject = "image" if image else "text", str(row.get("subject", ""))
    question = Question(
        name, require_text(row, "question", where), tuple(map(str, options)), LETTERS[answer], subject, medium
    )
    return question, str(row.get("hint") or "").strip(), image


def parse_scienceqa(text: str) -> str:
    """The letter that LLaVA's scorer reads, or "FAILED"."""
    if text in tuple(LETTERS):
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)  # the last dot is a wildcard there
    return found[0] if len(found) == 1 else "FAILED"


def scienceqa_right(text: str, question: Question, scorer: str = "official") -> bool:
    """Does the raw answer count? A letter beyond the options never does."""
    if scorer == "official":
        return parse_scienceqa(text) == question.answer
    text = text.strip()
    return text.lower() == question.answer.lower() or text[:2] == f"{question.answer}."


def score_scienceqa(
    task: Task, rows: dict[int, Record], folder: Path, run: dict[str, Any], scoring: Scoring
) -> Scored:
    """Accuracy over the split, and over problems with an image; a missing answer is wrong."""
    questions: list[Question] = task.truth
    texts = answer_texts(rows)
    values = [
        float(s.index in texts and scienceqa_right(texts[s.index], q, scoring.scorer))
        for s, q in zip(task.samples, questions)
    ]
    clusters = [f"{s.id}" for s in task.samples]
    metrics = {"accuracy": mean_metric(values, clusters)}
    metrics |= mean_metrics_by("medium", [q.medium for q in questions], values, clusters)
    metrics |= mean_metrics_by("subject", [q.kind for q in questions], values, clusters)
    per_sample = [row | {"cluster": c} for row, c in zip(option_rows(task, rows, values), clusters)]
    return Scored(metrics, {}, per_sample)


def submit_scienceqa(task: Task, rows: dict[int, Record], folder: Path, data: Path) -> list[Path]:
    """The leaderboard's file: the place of the option chosen, -1 where none could be read."""
    texts = answer_texts(rows)
    results = {}
    for sample, question in zip(task.samples, task.truth):
        place = LETTERS.find(parse_scienceqa(texts.get(sample.index, "")))
        results[sample.id] = place if place < len(question.options) else -1
    return [write_submission(folder, "scienceqa_results.json", {"results": results})]
