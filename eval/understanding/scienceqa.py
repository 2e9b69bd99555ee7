"""ScienceQA (arXiv 2209.09513): school questions with two to five options, half of them with an image.

Scorers: `official` (default) is LLaVA's parser; `lmms` takes "A" or "A. ...".
"""

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from open_unitok.core.errors import UserError

from ..core.annotations import (
    read_json_as,
    require_key,
    require_mostly_valid,
    require_text,
    require_type,
)
from ..core.answering import (
    PROMPT_TEMPLATES,
    answer_questions,
    answer_texts,
    answering_metadata,
    choose_prompt_template,
)
from ..core.benchmark import Options, Record, Sample, Scored, Task, malformed_sample
from ..core.image_files import image_path
from ..core.multiple_choice import (
    OPTION_LETTERS,
    ChoiceQuestion,
    choice_records,
    lettered_options,
    malformed_choice,
)
from ..core.parquet import ParquetImage, choose_split, read_parquet
from ..core.records import mean_metric, mean_metrics_by, write_submission
from ..core.release_files import RELEASES, detect_layout, find_beside, find_file, image_folders

_ORIGINAL, _LLAVA = RELEASES["scienceqa"].original, RELEASES["scienceqa"].llava

# columns of the published tables: subject, context (text, image, none), grade
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
GROUPS = (*SUBJECTS.values(), "TXT", "IMG", "NO", "G1-6", "G7-12")

answer = answer_questions


def load(data: Path, settings: Options) -> Task:
    """One sample per problem of a split of `pid_splits.json` (default: test), with or without an image."""
    layout = detect_layout(data, settings, _ORIGINAL, _LLAVA)
    if layout == "parquet":
        path, split, problems = _read_parquet(data, settings.split)
        splits = {split: list(problems)}
    else:
        path = find_file(data, _ORIGINAL, "ScienceQA problem file")
        split_file = find_beside(data, path, "pid_splits.json")
        problems, splits = read_json_as(dict, path), read_json_as(dict, split_file)
        split = settings.split or "test"
        if split not in splits:
            raise UserError(f"split is {split!r}; {split_file} has: {', '.join(splits)}.")
        require_type(list, splits[split], f"{split_file}, {split}")
    file, prompts = path, {}
    template = choose_prompt_template(settings, "letter")
    if layout == "llava":
        file = find_file(data, _LLAVA, "LLaVA question file")
        texts = _read_conversations(file)
        prompts = {name: PROMPT_TEMPLATES[template].format(text) for name, text in texts.items()}
    bases = image_folders(data, path, ("images", split))
    samples, questions = [], []
    for i, name in enumerate(map(str, splits[split][: settings.limit])):
        try:
            question, context, image = read_scienceqa_problem(problems, name, path, split, bases)
            if layout == "llava" and name not in prompts:
                raise UserError(f"{file}: problem {name} of split {split} is missing or malformed.")
        except UserError as error:
            row = problems.get(name)
            medium = "image" if isinstance(row, dict) and row.get("image") else "text"
            samples.append(malformed_sample(i, name, error))
            questions.append(malformed_choice(name, medium))
            continue
        # no line "Context: N/A": the published prompts have none where a problem has no hint
        body = f"Context: {context}\n" if context else ""
        body += lettered_options(question.question, question.options)
        # LLaVA's conversations hold the whole question; otherwise it is built in the same layout
        prompt = prompts.get(name) or PROMPT_TEMPLATES[template].format(body)
        samples.append(Sample(i, name, prompt, image))
        questions.append(question)
    template = f"{template} after {file.name}" if layout == "llava" else template
    metadata = answering_metadata(split, template, settings)
    return Task(require_mostly_valid(samples, file), questions, metadata)


def _read_parquet(data: Path, split: str | None) -> tuple[Path, str, dict[str, Any]]:
    """The first file, the split, and row number -> problem of the hub's table (`lmms-lab/ScienceQA`).

    The table has no problem ids. `ScienceQA-FULL` is preferred; the name of the split says if it is
    `ScienceQA-IMG`, the problems with an image.
    """
    name = "validation" if split == "val" else split
    found = choose_split(data, name, ("test",), ("ScienceQA-FULL", "ScienceQA-IMG"))
    columns = ("image", "question", "choices", "answer", "hint", "subject")
    problems = {str(i): row for i, row in enumerate(read_parquet(found.files, columns))}
    part = ", ScienceQA-IMG" if found.configuration == "ScienceQA-IMG" else ""
    return found.files[0], ("val" if found.split == "validation" else found.split) + part, problems


def _read_conversations(path: Path) -> dict[str, str]:
    """Problem id -> question of LLaVA's conversations, without the "<image>" mark."""
    result = {}
    for row in read_json_as(list, path):
        # an entry without id or question is skipped: `load` reports its problem as malformed
        with contextlib.suppress(UserError):
            turns = require_type(list, require_key(row, "conversations", path), path)
            text = require_text(turns[0] if turns else None, "value", str(path))
            result[str(require_key(row, "id", path))] = text.replace("<image>", "").strip()
    return result


def read_scienceqa_problem(
    problems: Any, name: str, path: Path, split: str, bases: Sequence[Path]
) -> tuple[ChoiceQuestion, str, Path | ParquetImage | None]:
    """A problem, its context, and its image if it has one; `bases` are folders of images or of splits."""
    where = f"{path}, problem {name}"
    row = require_key(problems, name, path)
    options, label = require_key(row, "choices", where), require_key(row, "answer", where)
    if not isinstance(options, list) or not 2 <= len(options) <= len(OPTION_LETTERS):
        raise UserError(f"{where}: choices is {options!r}; expected a list of two to five.")
    if not isinstance(label, int) or not 0 <= label < len(options):
        raise UserError(
            f"{where}: answer is {label!r}; it must be the index of one of {len(options)} choices."
        )
    image = row.get("image")
    if image and not isinstance(image, ParquetImage):
        folders = [base / inner for base in bases for inner in (name, f"{split}/{name}")]
        image = image_path(folders, require_text(row, "image", where))
    question = ChoiceQuestion(
        name,
        require_text(row, "question", where),
        tuple(map(str, options)),
        OPTION_LETTERS[label],
        kind=str(row.get("subject", "")),
        medium="image" if image else "text",
        groups=_published_groups(row, bool(image)),
    )
    hint = str(row.get("hint") or "").strip()
    return question, "" if hint.upper() == "N/A" else hint, image


def _published_groups(row: Record, has_image: bool) -> tuple[str, ...]:
    """The groups of the published tables in which a problem counts: by subject, context and grade."""
    hint, grade = str(row.get("hint") or "").strip(), str(row.get("grade") or "")
    number = int(grade.removeprefix("grade")) if grade.removeprefix("grade").isdecimal() else 0
    member = {
        "TXT": hint != "", "IMG": has_image, "NO": not hint and not has_image,
        "G1-6": 1 <= number <= 6, "G7-12": 7 <= number <= 12,
    }  # fmt: skip
    subject = SUBJECTS.get(str(row.get("subject") or ""))
    return (*([subject] if subject else []), *(name for name, counts in member.items() if counts))


def score(task: Task, records: dict[int, Record], folder: Path, run: Record, scoring: Options) -> Scored:
    """Accuracy overall, in the groups of the published tables, and by medium; missing answers are wrong."""
    questions: list[ChoiceQuestion] = task.truth
    texts = answer_texts(records)
    values = [
        float(s.index in texts and is_scienceqa_right(texts[s.index], q, scoring.scorer))
        for s, q in zip(task.samples, questions)
    ]
    # one question per image; files are all called image.png, so the id is the cluster
    clusters = [f"{s.id}" for s in task.samples]
    metrics = {"accuracy": mean_metric(values, clusters)}
    for group in GROUPS:
        if kept := [i for i, q in enumerate(questions) if group in q.groups]:
            metrics[group] = mean_metric([values[i] for i in kept], [clusters[i] for i in kept])
    metrics |= mean_metrics_by("medium", [q.medium for q in questions], values, clusters)
    lines = [row | {"cluster": c} for row, c in zip(choice_records(task, records, values), clusters)]
    return Scored(metrics, {}, lines)


def parse_scienceqa(text: str) -> str:
    """The letter by the rules of LLaVA's scorer, or "FAILED"."""
    if text in tuple(OPTION_LETTERS):
        return text
    if len(text) >= 3 and text[0] in OPTION_LETTERS and text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)  # the last dot is a wildcard, as published
    return found[0] if len(found) == 1 else "FAILED"


def is_scienceqa_right(text: str, question: ChoiceQuestion, scorer: str = "official") -> bool:
    """Whether the raw answer is correct."""
    if scorer == "official":
        return parse_scienceqa(text) == question.answer
    text = text.strip()
    return text.lower() == question.answer.lower() or text[:2] == f"{question.answer}."


def submit(task: Task, records: dict[int, Record], folder: Path, data: Path) -> list[Path]:
    """The leaderboard file: the index of the chosen option, or -1."""
    texts = answer_texts(records)
    results = {}
    for sample, question in zip(task.samples, task.truth):
        # find() of "FAILED" is -1, which the leaderboard expects
        index = OPTION_LETTERS.find(parse_scienceqa(texts.get(sample.index, "")))
        results[sample.id] = index if index < len(question.options) else -1
    return [write_submission(folder, "scienceqa_results.json", {"results": results})]
