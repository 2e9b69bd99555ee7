"""VizWiz (arXiv 1802.08218): questions of blind people, some unanswerable; ten answers, scored as TextVQA."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from open_unitok.core.errors import UserError

from ..core.annotations import (
    llava_ids,
    part_asked,
    read_json_as,
    read_llava_questions,
    require_mostly_valid,
    require_text,
    validate_record,
)
from ..core.answer_normalisation import normalise_m4c
from ..core.answering import (
    PROMPT_TEMPLATES,
    answer_questions,
    answer_texts,
    answering_metadata,
    choose_prompt_template,
)
from ..core.benchmark import Options, Record, Sample, Task, malformed_sample
from ..core.open_answers import (
    OpenQuestion,
    score_open_answers,
    with_annotator_answers,
    without_empty_answers,
)
from ..core.parquet import ParquetImage, choose_split, read_parquet, row_image
from ..core.records import submittable, write_submission
from ..core.release_files import RELEASES, detect_layout, find_file, holds_files, image_finder, image_folders

_ORIGINAL, _LLAVA = RELEASES["vizwiz"].original, RELEASES["vizwiz"].llava

answer = answer_questions
score = score_open_answers


def load(data: Path, settings: Options) -> Task:
    """One sample per entry of `{split}.json`, or per line of LLaVA's file; ids are image file names."""
    layout = detect_layout(data, settings, _ORIGINAL, _LLAVA)
    split = settings.split or ("test" if layout == "llava" else "val")
    file, known = None, {}  # LLaVA's archive comes without annotations
    images: dict[str, ParquetImage] = {}
    aliases: list[Any] = []
    if layout == "parquet":
        found = choose_split(data, settings.split, ("val",))
        split, (file, *_) = found.split, found.files
        known, images = _read_hub_rows(found.files)
    elif layout == "original" or holds_files(data if data.is_dir() else data.parent, _ORIGINAL):
        file = find_file(data, _ORIGINAL, "VizWiz annotation file", settings.split, f"{split}.json")
        known = _read_annotations(file)
    if layout == "llava":
        asked = find_file(data, _LLAVA, "LLaVA question file", settings.split, split)
        template, entries = f"as in {asked.name}", _llava_entries(asked, known)
        aliases = llava_ids(read_llava_questions(asked))
    else:
        asked, template = file or data, choose_prompt_template(settings, "unanswerable")
        entries = [
            (name, PROMPT_TEMPLATES[template].format(row["question"]) if isinstance(row, dict) else "", row)
            for name, row in known.items()
        ]
    folders = image_folders(data, asked, (file.stem if file else split, split, "images"))
    find_image = image_finder(folders)
    samples, questions = [], []
    for i, (name, prompt, row) in enumerate(entries[: settings.limit]):
        if isinstance(row, UserError):
            samples.append(malformed_sample(i, name, row))
            questions.append(OpenQuestion(name, ""))
            continue
        samples.append(Sample(i, name, prompt, images.get(name) or find_image(name)))
        kind = str(row.get("answer_type", ""))
        questions.append(OpenQuestion(name, row["question"], row.get("answers", ()), kind))
    part = ""
    if layout == "llava" and settings.limit is None and any(s.id in known for s in samples):
        valid = [name for name, row in known.items() if isinstance(row, dict)]
        part = part_asked((s.id for s in samples if not s.malformed), valid, asked)
    metadata = answering_metadata(file.stem if file and not images else split, template, settings)
    return Task(require_mostly_valid(samples, file or data), questions, metadata, (), aliases, part)


def _read_annotations(file: Path) -> dict[str, Any]:
    """Image name -> the entry, or "#number" -> the UserError of a malformed one."""
    valid = [
        validate_record(row, f"{file}, entry {i + 1}", (), ("question", "image"))
        for i, row in enumerate(read_json_as(list, file))
    ]
    return _by_image(valid, file)


def _read_hub_rows(files: Sequence[Path]) -> tuple[dict[str, Any], dict[str, ParquetImage]]:
    """Image name -> the entry of the hub's table (`lmms-lab/VizWiz-VQA`), and image name -> its image."""
    rows, images = [], {}
    for row in read_parquet(files, ("question_id", "image", "question", "answers", "category")):
        # question_id is the name of the image, with its suffix or without
        name = f"{Path(str(row['question_id'])).stem}.jpg"
        images[name] = row_image(row, name)
        released = row | {"image": name, "answer_type": row["category"] or ""}
        rows.append(validate_record(without_empty_answers(released), row["#"], (), ("question", "image")))
    return _by_image(rows, files[0]), images


def _by_image(valid: Sequence[Any], file: Path) -> dict[str, Any]:
    """Image name -> the entry with its answers, or "#number" -> the UserError of a malformed one."""
    rows = with_annotator_answers(valid, lambda i: f"{file}, entry {i + 1}")
    return {row["image"] if isinstance(row, dict) else f"#{i}": row for i, row in enumerate(rows)}


def _llava_entries(file: Path, known: dict[str, Any]) -> list[tuple[Any, str, Any]]:
    """(image name, prompt, entry) of each line of LLaVA's file."""
    lines = read_llava_questions(file)
    names = {Path(str(row.get("image"))).name for row in lines if isinstance(row, dict)}
    # annotations of another split: this one has no public answers
    if not names & known.keys():
        known = {}
    return [_llava_entry(row, known, f"{file}, line {i + 1}") for i, row in enumerate(lines)]


def _llava_entry(row: Any, known: dict[str, Any], where: str) -> tuple[str | None, str, Any]:
    """Image name, prompt and entry of a line; the entry is a UserError if either is invalid."""
    try:
        name = Path(require_text(row, "image", where)).name
    except UserError as error:
        return None, "", error
    if known and name not in known:
        return name, "", UserError(f"{where}: the released file has no question about {name}.")
    # the first line of a LLaVA prompt is the question
    return name, row["text"], known.get(name, {"question": row["text"].split("\n")[0]})


def submit(task: Task, records: dict[int, Record], folder: Path, data: Path) -> list[Path]:
    """The upload file of the VizWiz challenge."""
    texts = answer_texts(records)
    content = [
        {"image": s.id, "answer": normalise_m4c(texts.get(s.index, ""))} for s in submittable(task.samples)
    ]
    return [write_submission(folder, "vizwiz_answers.json", content)]
