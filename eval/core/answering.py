"""Answering questions about images: prompt templates, and batches that isolate a bad question."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from open_unitok.core.errors import UserError, did_you_mean

from .benchmark import Options, Record, Sample, Task
from .image_files import Base64Image, ImageList, read_sample_image, save_base64_image

# name -> template of a question; all but "plain" are those of published runs
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
# TextVQA's "ocr": the question, and the words that an OCR system found in the image
OCR_TEMPLATE = "{}\nReference OCR token: {}\nAnswer the question using a single word or phrase."
PUBLISHED_LENGTH = 128  # max_new_tokens of published runs
SCENES_LENGTH = 16  # max_new_tokens for scenes, whose answers are one or two words


def choose_prompt_template(
    settings: Options, default: str, data: Path | None = None, more: Sequence[str] = ()
) -> str:
    """The `prompt_template` option, else "plain" for scenes (scenes.json), else the benchmark's default."""
    # models of scenes are trained on bare questions: an instruction would be out of distribution
    own = "plain" if data is not None and (data / "scenes.json").exists() else default
    name, allowed = settings.prompt_template or own, [*PROMPT_TEMPLATES, *more]
    if name not in allowed:
        raise UserError(f"prompt_template is {name!r}." + did_you_mean(name, allowed))
    return name


def answering_metadata(
    split: str, template: str, settings: Options, max_new_tokens: int = PUBLISHED_LENGTH
) -> dict[str, Any]:
    """The part of a result that describes how answers were generated; `max_new_tokens` is the default."""
    return {
        "split": split,
        "prompt_template": template,
        "decoding": "greedy",
        "max_new_tokens": settings.max_new_tokens or max_new_tokens,
    }


def answer_questions(model: Any, batch: list[Sample], out: Path, task: Task) -> list[Record]:
    """Answer a batch; a sample with an invalid image or question gets a record with the error."""
    records: list[Record] = [{} for _ in batch]
    images, loaded = {}, {}
    for i, sample in enumerate(batch):
        try:
            # one object per image, so that the pipeline encodes it only once
            if sample.image not in loaded:
                loaded[sample.image] = _read_images(sample.image)
            images[i] = loaded[sample.image]
            if isinstance(sample.image, Base64Image):
                records[i] = {"file": save_base64_image(sample.image, out)}
        except UserError as error:
            records[i] = {"text": "", "error": str(error)}
    readable = list(images)
    if not readable:
        return records
    # one length for the whole benchmark, as recorded in the result
    length = task.metadata["max_new_tokens"]
    try:
        texts = model.answer([images[i] for i in readable], [batch[i].prompt for i in readable], length)
        for i, text in zip(readable, texts, strict=True):
            records[i] = {"text": text} | records[i]
    except UserError:
        # one invalid sample fails the whole batch: answer one by one to isolate it
        for i in readable:
            try:
                records[i] = _answer_alone(model, images[i], batch[i].prompt, length) | records[i]
            except UserError as error:
                records[i] = {"text": "", "error": str(error)}
    return records


def _answer_alone(model: Any, image: Any, prompt: str, length: int) -> Record:
    """The record of one question, with "max_new_tokens" if the context leaves less than `length`."""
    left = model.tokens_left(image, prompt) if hasattr(model, "tokens_left") else None
    if left is None or not 0 < left < length:
        return {"text": model.answer([image], [prompt], length)[0]}
    return {"text": model.answer([image], [prompt], left)[0], "max_new_tokens": left}


def _read_images(image: Any) -> Any:
    """The image of a question, a list of several, or None."""
    if isinstance(image, ImageList):
        return [read_sample_image(one) for one in image.images]
    return None if image is None else read_sample_image(image)


def answer_texts(records: dict[int, Record]) -> dict[int, str]:
    """Sample index -> answer; samples with an error are left out, which scorers count as wrong."""
    return {i: record["text"] for i, record in records.items() if not record.get("error")}
