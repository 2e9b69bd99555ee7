"""Asking questions about images: the words around a question, the LLaVA question files, the answers."""

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from open_unitok.core.errors import UserError, did_you_mean
from open_unitok.core.files import existing, read_json, read_jsonl_lenient

from . import tar_images
from .harness import Record, Sample, Settings, Task

# The words around a question, by name. All but "plain" are those of published runs.
PROMPT_TEMPLATES = {
    "short": "{}\nAnswer the question using a single word or phrase.",
    "letter": "{}\nAnswer with the option's letter from the given choices directly.",
    "letter-cn": "{}\n请直接回答选项字母。",
    "unanswerable": (
        "{}\nWhen the provided information is insufficient, respond with 'Unanswerable'."
        "\nAnswer the question using a single word or phrase."
    ),
    "plain": "{}",
}
OCR_TEMPLATE = (
    "{}\nReference OCR token: {}\nAnswer the question using a single word or phrase."  # TextVQA's "ocr"
)
LAYOUTS = ("original", "llava")


class Base64Image(NamedTuple):
    """An image that stands as base64 in a table."""

    name: str
    text: str


def choose_prompt_template(
    settings: Settings, default: str, data: Path | None = None, more: Sequence[str] = ()
) -> str:
    """The template asked for, else "plain" for scenes (scenes.json), else the benchmark's default."""
    own = "plain" if data is not None and (data / "scenes.json").exists() else default
    name, allowed = settings.prompt_template or own, [*PROMPT_TEMPLATES, *more]
    if name not in allowed:
        raise UserError(f"prompt_template is {name!r}." + did_you_mean(name, allowed))
    return name


def answering_metadata(split: str, template: str, settings: Settings, longest: int = 128) -> dict[str, Any]:
    """What the result says of how the answers came about; published runs let an answer have 128 tokens."""
    return {
        "split": split,
        "prompt_template": template,
        "decoding": "greedy",
        "max_new_tokens": settings.max_new_tokens or longest,
    }


# ------------------------------------------------------------------------------------------- question files


def find_file(
    data: Path, patterns: Sequence[str], what: str, split: str | None = None, default: str = ""
) -> Path:
    """The one file below `data` that fits a pattern and has `split` in its name; else the default of several.

    Raises:
        UserError: there is none, or there are several to choose from.
    """
    found = sorted({path for pattern in patterns for path in data.glob(pattern)})
    names = ", ".join(str(path.relative_to(data)) for path in found) or "nothing"
    if split or (default and len(found) > 1):
        found = [path for path in found if (split or default) in path.name]
    if len(found) != 1:
        raise UserError(
            f"{data}: expected one {what} ({' or '.join(patterns)}){f' of split {split}' if split else ''}, "
            f"found {names}." + (" Choose one with --split." if names != "nothing" else "")
        )
    return found[0]


def detect_layout(data: Path, settings: Settings, original: Sequence[str], llava: Sequence[str]) -> str:
    """ "original" or "llava": what was asked for, else what is there, the original first.

    Raises:
        UserError: neither is there, or a layout has another name.
    """
    patterns = {"original": tuple(original), "llava": tuple(llava)}
    if settings.layout is not None:
        return settings.layout
    for layout in LAYOUTS:
        if any(next(existing(data).glob(pattern), None) for pattern in patterns[layout]):
            return layout
    raise UserError(
        f"{data}: found nothing of this benchmark: neither {' nor '.join(patterns['original'])}, "
        f"as it is released, nor {' nor '.join(patterns['llava'])}, as LLaVA lays it out."
    )


def read_llava_questions(path: Path, limit: int | None = None) -> list[Record]:
    """The lines of a LLaVA question file, each with "question_id", "text", and "image" where it has one.

    A line that lacks a key stands as the UserError that names it.
    """
    return [
        validate_record(row, f"{path}, line {i + 1}", ("question_id",), ("text",))
        for i, row in enumerate(read_jsonl_lenient(path)[:limit])
    ]


def read_json_as(kind: type, path: Path, key: str = "") -> Any:
    """A JSON file, or its `key`, that is an object (`dict`) or a list.

    Raises:
        UserError: it is something else: another kind of file.
    """
    value = read_json(path)
    return (
        require_type(kind, require_key(value, key, path), f"{path}, {key}")
        if key
        else require_type(kind, value, path)
    )


def require_type(kind: type, value: Any, where: str | Path) -> Any:
    """`value`, an object (`dict`) or a list; UserError names the place."""
    if not isinstance(value, kind):
        words = {dict: "an object", list: "a list"}
        raise UserError(f"{where}: expected {words[kind]}, found {type(value).__name__}.")
    return value


def validate_record(row: Any, where: str, keys: Sequence[str] = (), texts: Sequence[str] = ()) -> Any:
    """The row as it is if it has these keys (texts or numbers) and these texts that are not empty.

    Else the UserError that says what it lacks.
    """
    try:
        for key in keys:
            if not isinstance(require_key(row, key, where), str | int):
                raise UserError(f"{where}: {key} is {row[key]!r}; it must be a text or a whole number.")
        for key in texts:
            require_text(row, key, where)
    except UserError as error:
        return error
    return row


def require_mostly_valid(samples: Sequence[Sample], path: Path) -> list[Sample]:
    """The samples as they are.

    Raises:
        UserError: more than half of them are malformed: the file is of another kind or version.
    """
    broken = [s.malformed for s in samples if s.malformed]
    if not samples:
        raise UserError(f"{path} is empty.")
    if len(broken) > len(samples) / 2:
        raise UserError(
            f"{path}: {len(broken)} of {len(samples)} entries are malformed, so that it is taken for another "
            f"kind of file. The first: {broken[0]}"
        )
    return list(samples)


def image_path(folders: Sequence[Path], name: str) -> Path:
    """The image of that name in the first folder that has it; else in the first folder, where it lacks."""
    places = [folder / name for folder in folders]
    return next((place for place in places if place.exists()), places[0])


def image_path_by_stem(
    folders: Sequence[Path], stem: str, suffixes: Sequence[str] = (".jpg", ".png", ".jpeg")
) -> Path:
    """As `image_in`, of an image whose suffix is not known."""
    places = [folder / f"{stem}{suffix}" for folder in folders for suffix in ("", *suffixes)]
    return next((place for place in places if place.is_file()), places[1])


def require_text(row: Record, key: str, where: str) -> str:
    """`row[key]`, a text that is not empty; UserError names the place."""
    value = require_key(row, key, where)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {key} is {value!r}; it must be a text that is not empty.")
    return value


def annotator_answers(row: Record, where: str) -> tuple[str, ...]:
    """The annotators' answers of a VQA-like row: texts, or {"answer": text, ...}.

    Raises:
        UserError: there are none, or one of them has no text.
    """
    answers = require_key(row, "answers", where)
    if not isinstance(answers, list) or not answers:
        raise UserError(f"{where}: answers is {answers!r}; expected a list of answers.")
    texts = [
        require_key(a, "answer", f"{where}, answers[{j}]") if isinstance(a, dict) else a
        for j, a in enumerate(answers)
    ]
    if (bad := next((t for t in texts if not isinstance(t, str | int | float)), "")) != "":
        raise UserError(f"{where}: one of the answers is {bad!r}; it must be a text.")
    return tuple(map(str, texts))


# --------------------------------------------------------------------------------------------------- asking


def answer_questions(model: Any, batch: list[Sample], out: Path, task: Task) -> list[Record]:
    """Answer a batch; a sample whose image or question cannot be used gets a row that says so."""
    rows: list[Record] = [{} for _ in batch]
    images, read = {}, {}
    for i, sample in enumerate(batch):
        try:
            if sample.image not in read:  # the same object again: the model encodes it once
                read[sample.image] = None if sample.image is None else read_image(sample.image)
            images[i] = read[sample.image]
            if isinstance(sample.image, Base64Image):
                rows[i] = {"file": save_base64_image(sample.image, out)}
        except UserError as error:
            rows[i] = {"text": "", "error": str(error)}
    places = list(images)
    if not places:
        return rows
    words = task.metadata["max_new_tokens"]
    try:
        texts = model.answer([images[i] for i in places], [batch[i].prompt for i in places], words)
        for i, text in zip(places, texts, strict=True):
            rows[i] = {"text": text} | rows[i]
    except UserError:
        for i in places:  # one of them is to blame: find it
            try:
                rows[i] = {"text": model.answer([images[i]], [batch[i].prompt], words)[0]} | rows[i]
            except UserError as error:
                rows[i] = {"text": "", "error": str(error)}
    return rows


def save_base64_image(picture: Base64Image, out: Path) -> str:
    """Write the image below `out`, for people to look at; returns the path there."""
    path = out / "images" / picture.name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(picture.text))
    return f"images/{picture.name}"


def read_image(path: Path | Base64Image | None):
    """An image in RGB, also from within a tar; UserError names the file that is missing or no image."""
    from open_unitok.tokenizer.images import load_image

    if isinstance(path, Base64Image):
        try:
            return load_image(base64.b64decode(path.text, validate=True))
        except (UserError, binascii.Error) as error:
            raise UserError(f"{path.name} is no image that can be read: {error}") from error
    assert path is not None
    if inside := tar_images.split(path):
        try:
            return load_image(tar_images.read(*inside))
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    if not path.exists():
        raise UserError(f"{path} does not exist.")
    return load_image(path)


def answer_texts(rows: dict[int, Record]) -> dict[int, str]:
    """Index -> text, of the samples that could be asked."""
    return {i: row["text"] for i, row in rows.items() if not row.get("error")}


def require_key(row: Any, key: str, where: str | Path) -> Any:
    """`row[key]`, or a one-line error that names the place and the key; a row that is an error is raised."""
    if isinstance(row, UserError):
        raise row
    if not isinstance(row, dict) or key not in row:
        raise UserError(f"{where}: the key {key!r} is missing.")
    return row[key]
