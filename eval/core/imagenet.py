"""ImageNet's 1000 classes and the layouts that its images lie in on people's disks."""

import csv
import functools
import importlib.resources
import json
import re
from pathlib import Path

from open_unitok.core.errors import UserError

from . import tar_images

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".JPEG", ".JPG", ".PNG")
WNID = re.compile(r"n\d{8}")


@functools.cache
def classes() -> tuple[tuple[str, str], ...]:
    """(WordNet id, name) by class number (data file `imagenet_classes.json`)."""
    file = importlib.resources.files("open_unitok.eval.core").joinpath("imagenet_classes.json")
    return tuple((wnid, name) for wnid, name in json.loads(file.read_text(encoding="utf-8"))["classes"])


@functools.cache
def numbers() -> dict[str, int]:
    """WordNet id -> class number."""
    return {wnid: number for number, (wnid, _) in enumerate(classes())}


def names() -> list[str]:
    """The class names by number."""
    return [name for _, name in classes()]


Labelled = list[tuple[Path, int | UserError]]


def find(data: Path, split: str = "val") -> Labelled | None:
    """(image, class number) of a split, in the order of the names; None where no layout of ImageNet is.

    In the place of an id or a class number that ImageNet does not have stands the UserError that says so.
    Layouts: a folder per WordNet id; Kaggle's flat folder with LOC_val_solution.csv; tars with .cls files.
    """
    for folder in (data / split, data / "ILSVRC" / "Data" / "CLS-LOC" / split, data):
        if not folder.is_dir():
            continue
        if any(WNID.fullmatch(p.name) for p in folder.iterdir()):
            return by_folder(folder)
        table = next((t for t in (data, folder) if (t / f"LOC_{split}_solution.csv").exists()), None)
        if table is not None:
            return by_table(folder, table / f"LOC_{split}_solution.csv")
        if shards := sorted(folder.glob("*.tar")):
            return [row for shard in shards for row in by_class_file(shard)]
    return None


def by_folder(folder: Path) -> Labelled:
    """A folder per WordNet id."""
    return [
        (path, number_of(one.name, str(one)))
        for one in sorted(folder.iterdir())
        if one.is_dir()
        for path in sorted(one.iterdir())
        if path.suffix in SUFFIXES
    ]


def by_table(folder: Path, table: Path) -> Labelled:
    """One flat folder and a table of ImageId and "WordNet-id box ..." per image."""
    with open(table, newline="", encoding="utf-8", errors="replace") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row.get("ImageId") or "")
    result: Labelled = []
    for row in rows:
        image, prediction = (row.get("ImageId") or "").strip(), (row.get("PredictionString") or "").strip()
        if not image or not prediction:
            lacks = UserError(f"{table}: a row lacks ImageId or PredictionString: {row}.")
            result.append((folder / f"{image or 'unknown'}.JPEG", lacks))
            continue
        result.append((folder / f"{image}.JPEG", number_of(prediction.split()[0], f"{table}, {image}")))
    return result


def by_class_file(shard: Path) -> Labelled:
    """A tar with a .cls file beside every image."""
    result: Labelled = []
    for picture in tar_images.members(shard, SUFFIXES):
        text = tar_images.beside(picture, ".cls")
        known = text is not None and text.strip().isdigit() and int(text) < len(classes())
        lacks = UserError(f"{picture} has no .cls file with a class number from 0 to {len(classes()) - 1}.")
        result.append((picture, int(text) if known and text else lacks))
    return result


def number_of(wnid: str, where: str) -> int | UserError:
    """The class number of a WordNet id, or that it is none."""
    if wnid not in numbers():
        return UserError(f"{where}: {wnid!r} is no WordNet id of ImageNet's 1000 classes.")
    return numbers()[wnid]
