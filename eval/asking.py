"""Asking questions about pictures: the words around a question, the LLaVA question files, the answers."""

from pathlib import Path
from typing import Any

from open_unitok.errors import UserError, did_you_mean

from .harness import Row, Sample, Settings, Task

# The words around a question, by name. All but "plain" are those of published runs.
RECIPES = {
    "short": "{}\nAnswer the question using a single word or phrase.",
    "letter": "{}\nAnswer with the option's letter from the given choices directly.",
    "letter-cn": "{}\n请直接回答选项字母。",
    "unanswerable": (
        "{}\nWhen the provided information is insufficient, respond with 'Unanswerable'."
        "\nAnswer the question using a single word or phrase."
    ),
    "plain": "{}",
}


def recipe_for(settings: Settings, default: str, data: Path | None = None) -> str:
    """The recipe asked for, else "plain" for scenes (a folder with scenes.json), else the benchmark's own."""
    own = "plain" if data is not None and (data / "scenes.json").exists() else default
    name = settings.recipe or own
    if name not in RECIPES:
        raise UserError(f"recipe is {name!r}." + did_you_mean(name, RECIPES))
    return name


def about_asking(split: str, recipe: str, settings: Settings, longest: int = 128) -> dict[str, Any]:
    """What the result says of how the answers came about; published runs let an answer have 128 tokens."""
    words = settings.max_new_tokens or (16 if recipe == "plain" and longest == 128 else longest)
    return {"split": split, "recipe": recipe, "decoding": "greedy", "max_new_tokens": words}


def ask(model: Any, batch: list[Sample], out: Path, task: Task) -> list[Row]:
    """Answer a batch; a sample whose picture or question cannot be used gets a row that says so."""
    rows: list[Row] = [{} for _ in batch]
    images, read = {}, {}
    for i, sample in enumerate(batch):
        try:
            if sample.image not in read:  # the same object again: the model encodes it once
                read[sample.image] = None if sample.image is None else read_picture(sample.image)
            images[i] = read[sample.image]
        except UserError as error:
            rows[i] = {"text": "", "error": str(error)}
    places = list(images)
    if not places:
        return rows
    words = task.about["max_new_tokens"]
    try:
        texts = model.answer([images[i] for i in places], [batch[i].prompt for i in places], words)
        for i, text in zip(places, texts, strict=True):
            rows[i] = {"text": text}
    except UserError:
        for i in places:  # one of them is to blame: find it
            try:
                rows[i] = {"text": model.answer([images[i]], [batch[i].prompt], words)[0]}
            except UserError as error:
                rows[i] = {"text": "", "error": str(error)}
    return rows


def read_picture(path: Path | None):
    """A picture in RGB; UserError names the file that is missing or no picture."""
    from open_unitok.tokenizer.images import load_image

    assert path is not None
    if not path.exists():
        raise UserError(f"{path} does not exist.")
    return load_image(path)


def answered(rows: dict[int, Row]) -> dict[int, str]:
    """Index -> text, of the samples that could be asked."""
    return {i: row["text"] for i, row in rows.items() if not row.get("error")}


def entry(row: Any, key: str, where: str | Path) -> Any:
    """`row[key]`, or a one-line error that names the place and the key."""
    if not isinstance(row, dict) or key not in row:
        raise UserError(f"{where}: the key {key!r} is missing.")
    return row[key]
