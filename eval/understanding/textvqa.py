"""TextVQA (arXiv 1904.08920): questions about text in images, ten answers each, M4C/EvalAI normalisation.

Published numbers use prompts with the words that an OCR system found ("ocr", the default). Without them
(`--prompt-template short`) scores are about ten points lower.
"""

from collections.abc import Sequence
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
    validate_record,
)
from ..core.answer_normalisation import normalise_m4c
from ..core.answering import (
    OCR_TEMPLATE,
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
from ..core.parquet import choose_split, read_parquet, row_image
from ..core.records import submittable, write_submission
from ..core.release_files import (
    RELEASES,
    detect_layout,
    find_beside,
    find_file,
    image_finder,
    image_folders,
)

_ORIGINAL, _LLAVA = RELEASES["textvqa"].original, RELEASES["textvqa"].llava
_OCR_FILE = "TextVQA_Rosetta_OCR_v0.2_{}.json"
_IMAGE_FOLDERS = ("train_images", "test_images", "images")
_SUFFIXES = ("", ".jpg", ".png", ".jpeg")
_HUB_SPLITS = {"val": "validation"}  # names of splits in the release -> on the hub (`lmms-lab/textvqa`)
_HUB_COLUMNS = ("image_id", "question_id", "question", "image", "answers", "ocr_tokens")

answer = answer_questions
score = score_open_answers


def load(data: Path, settings: Options) -> Task:
    """One sample per question of `TextVQA_0.5.1_{split}.json`, or of LLaVA's question file."""
    layout = detect_layout(data, settings, _ORIGINAL, _LLAVA)
    if layout == "parquet":
        found = choose_split(data, _HUB_SPLITS.get(settings.split, settings.split), ("validation",))
        path, split = (
            found.files[0],
            {hub: name for name, hub in _HUB_SPLITS.items()}.get(found.split, found.split),
        )
        released = [without_empty_answers(row) for row in read_parquet(found.files, _HUB_COLUMNS)]
    else:
        path = find_file(data, _ORIGINAL, "TextVQA annotation file", settings.split, "_val.")
        split = path.stem.removeprefix("TextVQA_0.5.1_")
        released = read_json_as(list, path, "data")
    valid = [
        validate_record(row, f"{path}, data[{i}]", ("question_id", "image_id"), ("question",))
        for i, row in enumerate(released)
    ]
    rows = with_annotator_answers(valid, lambda i: f"{path}, data[{i}]")
    if layout == "llava":
        return _load_llava(data, settings, path, rows, split)
    template = choose_prompt_template(settings, "ocr", more=("ocr",))
    tokens, problems = _ocr_tokens(data, path, split, rows) if template == "ocr" else ({}, [])
    find_image = image_finder(image_folders(data, path, _IMAGE_FOLDERS), _SUFFIXES)
    samples, questions = [], []
    for i, row in enumerate(rows[: settings.limit]):
        if isinstance(row, UserError):
            samples.append(malformed_sample(i, None, row))
            questions.append(OpenQuestion(None, ""))
            continue
        if template == "ocr":
            words = ", ".join(tokens.get(row["image_id"], ()))
            prompt = OCR_TEMPLATE.format(row["question"], words)
        else:
            prompt = PROMPT_TEMPLATES[template].format(row["question"])
        if layout == "parquet":
            image = row_image(row, f"{row['image_id']}.jpg")
        else:
            image = find_image(str(row["image_id"]))
        samples.append(Sample(i, row["question_id"], prompt, image))
        questions.append(_question_of(row))
    metadata = answering_metadata(split, template, settings)
    return Task(require_mostly_valid(samples, path), questions, metadata, problems)


def _question_of(row: Record) -> OpenQuestion:
    """The question of an annotation entry; test sets have no answers."""
    return OpenQuestion(row["question_id"], row["question"], row.get("answers", ()))


def _ocr_tokens(
    data: Path, file: Path, split: str, rows: Sequence[Any]
) -> tuple[dict[str, list[str]], list[str]]:
    """Image id -> OCR words (Rosetta), from the rows or from the released OCR file; and warnings."""
    valid = [row for row in rows if isinstance(row, dict)]
    # some versions of the annotation file include the words
    if all("ocr_tokens" in row for row in valid):
        return _words_by_image(valid)
    path = find_beside(data, file, _OCR_FILE.format(split))
    if not path.exists():
        raise UserError(
            f"{path} does not exist: the published prompt contains OCR words. Download it, or use "
            "--prompt-template short, which scores about ten points lower."
        )
    tokens, problems = _words_by_image(read_json_as(list, path, "data"), path.name)
    # these prompts have an empty list of words, which lowers the score
    missing = [row["image_id"] for row in valid if row["image_id"] not in tokens]
    if missing:
        problems.append(
            f"{len(missing)} questions have no words in {path.name}, for instance of image {missing[0]}"
        )
    return tokens, problems


def _words_by_image(rows: Sequence[Any], name: str = "") -> tuple[dict[str, list[str]], list[str]]:
    """Image id -> words, and a warning about malformed rows."""
    tokens, malformed = {}, 0
    for row in rows:
        words = row.get("ocr_tokens") if isinstance(row, dict) else None
        if not isinstance(words, list) or not isinstance(row.get("image_id"), str | int):
            malformed += 1
        else:
            tokens[row["image_id"]] = [str(word) for word in words]
    problem = f"{malformed} entries of OCR words {name} are malformed (no words there)"
    return tokens, [problem] if malformed else []


def _load_llava(data: Path, settings: Options, path: Path, rows: list[Record], split: str) -> Task:
    """The task of LLaVA's question file."""
    file = find_file(data, _LLAVA, "LLaVA question file", settings.split)
    folders = image_folders(data, path, _IMAGE_FOLDERS)
    find_image, find_by_id = image_finder(folders), image_finder(folders, _SUFFIXES)
    # question_id is the image id in LLaVA's file: join by image and question, as its scorer does
    known = {(str(row["image_id"]), row["question"].lower()): row for row in rows if isinstance(row, dict)}
    samples, questions, asked = [], [], set()
    for i, line in enumerate(read_llava_questions(file, settings.limit)):
        where = f"{file}, line {i + 1}"
        try:
            key = (str(require_key(line, "question_id", where)), question_in_prompt(line["text"], where))
            if key not in known:
                raise UserError(f"{where}: {path.name} has no question {key[1]!r} about image {key[0]}.")
            row = known[key]
            asked.add(key)
            # older versions of LLaVA's file have the image id only
            if "image" in line:
                image = find_image(Path(require_text(line, "image", where)).name)
            else:
                image = find_by_id(str(row["image_id"]))
            samples.append(Sample(i, row["question_id"], line["text"], image))
            questions.append(_question_of(row))
        except UserError as error:
            samples.append(malformed_sample(i, None, error))
            questions.append(OpenQuestion(None, ""))
    metadata = answering_metadata(split, f"as in {file.name}", settings)
    part = part_asked(asked, set(known), file) if settings.limit is None else ""
    return Task(require_mostly_valid(samples, file), questions, metadata, not_comparable=part)


def question_in_prompt(prompt: str, where: str) -> str:
    """The question in lower case, extracted from one of the four known prompt layouts."""
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: ") and "Question: " in prompt and " Short answer:" in prompt:
        return prompt.split("Question: ")[1].split(" Short answer:")[0].lower()
    if "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    if len(lines) == 2:
        return lines[0].lower()
    raise UserError(f"{where}: the prompt has none of the known layouts: {prompt!r}.")


def submit(task: Task, records: dict[int, Record], folder: Path, data: Path) -> list[Path]:
    """The upload file of the TextVQA challenge."""
    texts = answer_texts(records)
    content = [
        {"question_id": s.id, "answer": normalise_m4c(texts.get(s.index, ""))}
        for s in submittable(task.samples)
    ]
    return [write_submission(folder, "textvqa_answers.json", content)]
