"""SEED-Bench (arXiv 2307.16125): multiple choice in twelve dimensions over images and videos.

Scorers: `official` (default) accepts only the bare letter, as LLaVA's scorer does; `lmms` uses the first
character of the answer, case-insensitively.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from open_unitok.core.errors import UserError

from ..core.annotations import (
    part_asked,
    read_json_as,
    read_llava_questions,
    require_key,
    require_mostly_valid,
    require_text,
)
from ..core.answering import (
    PROMPT_TEMPLATES,
    answer_questions,
    answer_texts,
    answering_metadata,
    choose_prompt_template,
)
from ..core.benchmark import Options, Record, Sample, Scored, Task, malformed_sample
from ..core.multiple_choice import ChoiceQuestion, choice_records, lettered_options, malformed_choice
from ..core.parquet import ParquetImage, choose_split, read_parquet
from ..core.records import cluster_of, mean_metric, mean_metrics_by, submittable, write_submission
from ..core.release_files import RELEASES, detect_layout, find_file, image_finder, image_folders

_ORIGINAL, _LLAVA = RELEASES["seedbench"].original, RELEASES["seedbench"].llava
_IMAGE_FOLDERS = {"image": "SEED-Bench-image", "video": "SEED-Bench-video-image"}
_SUFFIXES = ("", ".jpg", ".png", ".jpeg")  # the released images have none
# the error in place of the image if the annotation is malformed
SeedbenchEntry = tuple[ChoiceQuestion, Path | ParquetImage | UserError]
# the hub's table (`lmms-lab/SEED-Bench`) has the numbers alone: these are the names in SEED-Bench.json
_HUB_NAMES = (
    "Scene Understanding", "Instance Identity", "Instance Attributes", "Instance Location",
    "Instances Counting", "Spatial Relation", "Instance Interaction", "Visual Reasoning",
    "Text Understanding", "Action Recognition", "Action Prediction", "Procedure Understanding",
)  # fmt: skip
_HUB_TYPES = {kind(i): name for i, name in enumerate(_HUB_NAMES, 1) for kind in (int, str)}
_HUB_COLUMNS = ("question_id", "question", "answer", "data_id", "data_type", "question_type_id", "image")

answer = answer_questions


def load(data: Path, settings: Options) -> Task:
    """One sample per question; `split`: "image" or "video". A video is one frame, as in LLaVA.

    Images: `SEED-Bench-image/{data_id}`; frames: `SEED-Bench-video-image/{question_id}.png`.
    """
    layout = detect_layout(data, settings, _ORIGINAL, _LLAVA)
    if settings.split not in (None, "image", "video"):
        raise UserError(f"split is {settings.split!r}; allowed: image, video.")
    if layout == "parquet":
        files = choose_split(data, defaults=("test",)).files
        path, known = (
            files[0],
            _read_questions(list(read_parquet(files, _HUB_COLUMNS)), _HUB_TYPES, files[0], data),
        )
    else:
        path = find_file(data, _ORIGINAL, "SEED-Bench annotation file")
        # "question_type" maps names to numbers; entries have the number
        types = read_json_as(dict, path, "question_type").items()
        kinds = {number: name for name, number in types if isinstance(number, str | int)}
        known = _read_questions(read_json_as(list, path, "questions"), kinds, path, data)
    part = ""
    if layout == "llava":
        file = find_file(data, _LLAVA, "LLaVA question file")
        template, entries = f"as in {file.name}", _llava_entries(data, file, path, known)
        sides = (known, entries)
        asked, released = (
            [entry[0].question_id for entry in side if not isinstance(entry[1], UserError)]
            for side in reversed(sides)
        )
        part = part_asked(asked, released, file)
    else:
        template, file = choose_prompt_template(settings, "letter"), path
        entries = [
            (q, image, PROMPT_TEMPLATES[template].format(lettered_options(q.question, q.options)))
            for q, image in known
        ]
    # a malformed question of unknown medium counts in both splits
    entries = [
        entry for entry in entries if settings.split is None or entry[0].medium in ("", settings.split)
    ]
    entries = entries[: settings.limit]
    samples = [
        malformed_sample(i, q.question_id, image)
        if isinstance(image, UserError)
        else Sample(i, q.question_id, prompt, image)
        for i, (q, image, prompt) in enumerate(entries)
    ]
    metadata = answering_metadata(settings.split or "images and videos", template, settings)
    return Task(
        require_mostly_valid(samples, file), [q for q, _, _ in entries], metadata, not_comparable=part
    )


def _llava_entries(
    data: Path, file: Path, path: Path, known: list[SeedbenchEntry]
) -> list[tuple[ChoiceQuestion, Any, str]]:
    """(question, image or error, prompt) of each line of LLaVA's file."""
    # the released file has one id twice (49914): the lines about it follow the order of the file
    left: dict[str, list[SeedbenchEntry]] = {}
    for question, image in known:
        left.setdefault(question.question_id, []).append((question, image))
    find_image = image_finder([*image_folders(data, file, ()), *image_folders(data, path, ())])
    entries = []
    for i, row in enumerate(read_llava_questions(file)):
        name = str(row["question_id"]) if isinstance(row, dict) else f"#{i}"
        unknown = UserError(f"{file}, line {i + 1}: question_id {name} is not in {path.name}.")
        question, image = left[name].pop(0) if left.get(name) else (malformed_choice(name), unknown)
        # the error takes the place of the image: `load` then makes a malformed sample
        if isinstance(row, UserError):
            image, row = row, {"text": ""}
        if not isinstance(image, UserError) and isinstance(row.get("image"), str):
            named = find_image(row["image"])
            image = named if named.exists() else image
        entries.append((question, image, row["text"]))
    return entries


def _read_questions(
    rows: Sequence[Any], kinds: Mapping[Any, str], path: Path, data: Path
) -> list[SeedbenchEntry]:
    """Every question with its image; ids are not unique."""
    find_image = {
        medium: image_finder(image_folders(data, path, (name,)), _SUFFIXES)
        for medium, name in _IMAGE_FOLDERS.items()
    }
    known: list[SeedbenchEntry] = []
    for i, row in enumerate(rows):
        try:
            known.append(read_seedbench_question(row, f"{path}, questions[{i}]", kinds, find_image))
        except UserError as error:
            medium = row.get("data_type") if isinstance(row, dict) else ""
            medium = medium if medium in ("image", "video") else ""
            known.append((malformed_choice(f"#{i}", medium), error))
    return known


def read_seedbench_question(
    row: Record, where: str, kinds: Mapping[Any, str], find_image: Mapping[str, Callable[[str], Path]]
) -> tuple[ChoiceQuestion, Path | ParquetImage]:
    """A question of `SEED-Bench.json` and its image or frame; `find_image`: medium -> name -> path."""
    options = tuple(str(require_key(row, f"choice_{letter}", where)) for letter in "abcd")
    label, name = require_key(row, "answer", where), str(require_key(row, "question_id", where))
    medium = row.get("data_type")
    if label not in tuple("ABCD"):
        raise UserError(f"{where}: answer is {label!r}; allowed: A, B, C, D.")
    if medium not in ("image", "video"):
        raise UserError(f"{where}: data_type is {medium!r}; allowed: image, video.")
    number = require_key(row, "question_type_id", where)
    kind = kinds.get(number) if isinstance(number, str | int) else None
    if kind is None:
        raise UserError(f"{where}: question_type_id is {number!r}, which question_type lacks.")
    # frames are named by question_id, images by data_id
    stem = str(require_key(row, "data_id", where)) if medium == "image" else name
    question = ChoiceQuestion(name, require_text(row, "question", where), options, label, kind, medium)
    if isinstance(frames := row.get("image"), list):  # the hub's table: one image, or the frames of a video
        if not frames:
            raise UserError(f"{where}: image is empty.")
        return question, frames[len(frames) // 2]._replace(name=stem)
    return question, find_image[medium](stem)


def score(task: Task, records: dict[int, Record], folder: Path, run: Record, scoring: Options) -> Scored:
    """Accuracy overall, by medium and by dimension; missing answers are wrong."""
    questions: list[ChoiceQuestion] = task.truth
    texts = answer_texts(records)
    values = [
        float(s.index in texts and is_seedbench_right(texts[s.index], q.answer, scoring.scorer))
        for s, q in zip(task.samples, questions)
    ]
    clusters = [cluster_of(s) for s in task.samples]
    metrics = {"accuracy": mean_metric(values, clusters)}
    metrics |= mean_metrics_by("medium", [q.medium for q in questions], values, clusters)
    metrics |= mean_metrics_by("type", [q.kind for q in questions], values, clusters)
    return Scored(metrics, {}, choice_records(task, records, values))


def is_seedbench_right(text: str, label: str, scorer: str = "official") -> bool:
    """Whether the raw answer is correct."""
    return text == label if scorer == "official" else text.strip()[:1].upper() == label


def submit(task: Task, records: dict[int, Record], folder: Path, data: Path) -> list[Path]:
    """The upload file of the leaderboard."""
    texts = answer_texts(records)
    content = [{"question_id": s.id, "prediction": texts.get(s.index, "")} for s in submittable(task.samples)]
    return [write_submission(folder, "seedbench_predictions.jsonl", content)]
