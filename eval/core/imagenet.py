"""The 1000 classes of ImageNet, and readers of its common folder layouts."""

import functools
import re
from pathlib import Path

from open_unitok.core.errors import UserError
from open_unitok.core.text_files import read_csv, read_json

from .image_files import list_images, read_tar_sibling, tar_images

WNID = re.compile(r"n\d{8}")
LabelledImages = list[tuple[Path, int | UserError]]


@functools.cache
def imagenet_classes() -> tuple[tuple[str, str], ...]:
    """(WordNet id, name) by class number (data file `data/imagenet_classes.json`)."""
    file = Path(__file__).parent / "data" / "imagenet_classes.json"
    return tuple((wnid, name) for wnid, name in read_json(file)["classes"])


@functools.cache
def class_numbers() -> dict[str, int]:
    """WordNet id -> class number."""
    return {wnid: number for number, (wnid, _) in enumerate(imagenet_classes())}


def class_names() -> list[str]:
    """The class names by number."""
    return [name for _, name in imagenet_classes()]


def find_labelled_images(data: Path, split: str = "val") -> LabelledImages | None:
    """(image, class number) pairs of a split, sorted by name; None if `data` has no ImageNet layout.

    Layouts: a folder per WordNet id; Kaggle's flat folder with LOC_val_solution.csv; tars with .cls files. An
    unknown class is represented by a UserError instead of the number.
    """
    for folder in (data / split, data / "ILSVRC" / "Data" / "CLS-LOC" / split, data):
        if not folder.is_dir():
            continue
        if any(WNID.fullmatch(p.name) for p in folder.iterdir()):
            return _by_folder(folder)
        table = next((t for t in (data, folder) if (t / f"LOC_{split}_solution.csv").exists()), None)
        if table is not None:
            return _by_table(folder, table / f"LOC_{split}_solution.csv")
        if shards := sorted(folder.glob("*.tar")):
            return [image for shard in shards for image in _by_class_file(shard)]
    return None


def _by_folder(folder: Path) -> LabelledImages:
    """A folder per WordNet id."""
    return [
        (path, _class_number(wnid.name, str(wnid)))
        for wnid in sorted(folder.iterdir())
        if wnid.is_dir()
        for path in list_images(wnid, recursive=False)
    ]


def _by_table(folder: Path, table: Path) -> LabelledImages:
    """A flat folder and a table with ImageId and "WordNet-id box ..." per image."""
    # sorted as in the other layouts, so that --limit selects the same images
    rows = sorted(read_csv(table), key=lambda row: row.get("ImageId") or "")
    result: LabelledImages = []
    for row in rows:
        image, prediction = (row.get("ImageId") or "").strip(), (row.get("PredictionString") or "").strip()
        if not image or not prediction:
            error = UserError(f"{table}: a row lacks ImageId or PredictionString: {row}.")
            result.append((folder / f"{image or 'unknown'}.JPEG", error))
            continue
        number = _class_number(prediction.split()[0], f"{table}, {image}")
        result.append((folder / f"{image}.JPEG", number))
    return result


def _by_class_file(shard: Path) -> LabelledImages:
    """A tar with a .cls file for every image."""
    result: LabelledImages = []
    last = len(imagenet_classes()) - 1  # .cls files hold the class number, not the WordNet id
    for image in tar_images(shard):
        text = read_tar_sibling(image, ".cls")
        # a missing or invalid .cls makes the image count as wrong
        known = text is not None and text.strip().isdigit() and int(text) <= last
        error = UserError(f"{image} has no .cls file with a class number from 0 to {last}.")
        result.append((image, int(text) if known and text else error))
    return result


def _class_number(wnid: str, where: str) -> int | UserError:
    """The class number of a WordNet id, or a UserError if ImageNet does not have it."""
    if wnid not in class_numbers():
        return UserError(f"{where}: {wnid!r} is not a WordNet id of ImageNet's 1000 classes.")
    return class_numbers()[wnid]
