"""Source formats of `unitok data convert`: how data sets are laid out on disk, each as a stream of samples.

The info of a sample becomes its KEY.json: {"captions": [str]}, optionally with "long_caption" and
"short_caption"; {"conversations": [[{"from": "human" | "gpt", "value"}]]}; or {"document": [str | int]} with
numbers of the sample's images; or {"label": int}.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tqdm import tqdm

from open_unitok.core.errors import UserError
from open_unitok.core.image_names import IMAGE_SUFFIXES, find_images, find_sibling
from open_unitok.core.text_files import parse_json, read_json, read_lines

from .captions import CAPTION_KEYS, TEXT_EXTENSIONS, caption_list, chosen_captions, name_captions
from .records import conversation_turns, file_of_image, image_key, image_names, read_records, unused_key
from .tar_index import BadSample

_METADATA_FILES = ("metadata.jsonl", "metadata.csv")
_TEXT_SUFFIXES = tuple(f".{extension}" for extension in TEXT_EXTENSIONS)
# keys of a metadata record, in the order of preference
_FILE_KEYS = ("file_name", "file", "image", "image_path", "path", "filename")


class Source(NamedTuple):
    """A data set on disk, with the options of `unitok data convert`."""

    path: Path
    images: Path | None = None  # folder that image names are relative to
    column: str | None = None  # key of the caption
    captions: str = "all"  # a value of CAPTION_CHOICES

    @property
    def folder(self) -> Path:
        """The folder of the images."""
        return self.images or (self.path if self.path.is_dir() else self.path.parent)


class SourceSample(NamedTuple):
    """One sample before its images are read; `problem` says why it cannot be used."""

    key: str
    images: list[Path]
    info: dict[str, Any]
    problem: str = ""


class SourceFormat(NamedTuple):
    """A stream of samples, the same on every call, and a description of the expected input."""

    samples: Callable[[Source], Iterator[SourceSample]]
    expected: str


# ---- images with captions: a folder with .txt files, or with metadata.jsonl or .csv ------------------------


def folder_samples(source: Source) -> Iterator[SourceSample]:
    """A folder with `x.jpg` and `x.txt` (a caption per line), or with metadata; or a metadata file itself."""
    used: set[str] = set()  # a.b.jpg and a_b.jpg have the same key
    for name, info, problem in _named_images(source):
        try:
            path = file_of_image(source.folder, name)
            name = path.relative_to(source.folder).as_posix()
            yield SourceSample(
                unused_key(image_key(name), name, used), [path], {**info, "file": name}, problem
            )
        except BadSample as error:
            yield SourceSample(name, [], {}, problem or str(error))


def _named_images(source: Source) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(name of the image, its info, problem)."""
    if source.path.is_dir():
        metadata = next((source.path / m for m in _METADATA_FILES if (source.path / m).exists()), None)
        if metadata is None:
            yield from _images_with_texts(source)
            return
    else:
        metadata = source.path
    for number, record in enumerate(read_records(metadata), 1):
        name = next((record[k] for k in _FILE_KEYS if isinstance(record.get(k), str) and record[k]), None)
        if name is None:
            has = ", ".join(map(str, record)) or "no keys"
            yield f"{metadata.name}_{number}", {}, f"names no image (key {_FILE_KEYS[0]}); it has {has}"
        else:
            yield _with_captions(name, record, source)


def _images_with_texts(source: Source) -> Iterator[tuple[str, dict[str, Any], str]]:
    found = find_images(source.path)
    texts = [find_sibling(path, _TEXT_SUFFIXES) for path in found.images]
    used = set(texts)
    lone = [p for p in found.companions if p.suffix.lower() in _TEXT_SUFFIXES and p not in used]
    if lone:
        found.left_out["texts without an image"] = lone
    if note := found.note(source.path):
        tqdm.write(f"data: {note}", file=sys.stderr)
    for path, text in zip(found.images, texts):
        name, captions, problem = path.relative_to(source.path).as_posix(), [], ""
        if source.captions == "name":
            captions = name_captions(name)
        elif text is not None:
            try:
                captions = chosen_captions(read_lines(text), source.captions)
            except UserError as error:
                problem = str(error)
        yield name, {"captions": captions}, problem


def _with_captions(name: str, record: dict[str, Any], source: Source) -> tuple[str, dict[str, Any], str]:
    """(name, info, problem) of the image of a metadata record."""
    column = source.column
    if column is not None and column not in record:
        raise UserError(f"--column is {column}, must be one of: {', '.join(map(str, record))}.")
    if source.captions == "name":
        return name, {"captions": name_captions(name)}, ""
    # a list of captions, or one text
    value = next((record[key] for key in ((column,) if column else CAPTION_KEYS) if record.get(key)), [])
    extra = {key: str(record[key]) for key in ("long_caption", "short_caption") if record.get(key)}
    try:
        texts = caption_list(value if isinstance(value, list) else str(value))
        return name, {"captions": chosen_captions(texts, source.captions), **extra}, ""
    except BadSample as error:
        return name, {}, str(error)


# ---- conversations as LLaVA writes them --------------------------------------------------------------------


def llava_samples(source: Source) -> Iterator[SourceSample]:
    """LLaVA's JSON: [{"id", "image": name | [names], "conversations": [{"from", "value"}]}, ...]."""
    for number, record in enumerate(read_records(source.path)):
        try:
            names = image_names(record)
            turns = conversation_turns(record, len(names))
            info = {"conversations": [turns], "id": str(record.get("id", number))}
            paths = [file_of_image(source.folder, name) for name in names]
            if len(paths) == 1:
                info["file"] = paths[0].relative_to(source.folder).as_posix()
            yield SourceSample(f"{number:09d}", paths, info)
        except BadSample as error:
            yield SourceSample(f"{number:09d}", [], {}, str(error))


# ---- interleaved documents ---------------------------------------------------------------------------------


def obelics_samples(source: Source) -> Iterator[SourceSample]:
    """OBELICS: {"texts": [str | null], "images": [null | name]}, one of the two at each index."""
    find = _ImageFinder(source.folder)
    for number, record in enumerate(read_records(source.path)):
        texts, images = (_parse_list(record.get(name)) for name in ("texts", "images"))
        if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
            yield SourceSample(f"{number:09d}", [], {}, 'has no "texts" and "images" of the same length')
            continue
        pieces = [find(image) if image else text for text, image in zip(texts, images)]
        yield _document(number, pieces, sum(map(bool, images)))


def mmc4_samples(source: Source) -> Iterator[SourceSample]:
    """MMC4: {"text_list": [str], "image_info": [{"image_name", "matched_text_index"}]}; an image comes before
    the sentence that it matches."""
    find = _ImageFinder(source.folder)
    for number, record in enumerate(read_records(source.path)):
        texts, images = record.get("text_list"), record.get("image_info", [])
        if not (
            isinstance(texts, list) and isinstance(images, list) and all(isinstance(i, dict) for i in images)
        ):
            yield SourceSample(f"{number:09d}", [], {}, 'has no "text_list" and "image_info"')
            continue
        # texts, and paths of the images that were found; None where one was not
        pieces: list[Any] = []
        for index, text in enumerate(texts):
            matching = [i for i in images if i.get("matched_text_index") == index]
            # the file name first: finding a URL reads the .json of every image
            pieces += [find(i.get("image_name")) or find(i.get("raw_url")) for i in matching]
            pieces.append(text)
        yield _document(number, pieces, len(images))


def _parse_list(value: Any) -> Any:
    """A list, or the JSON of one, which is how tables store lists."""
    try:
        return parse_json(value, "a list") if isinstance(value, str) else value
    except UserError:
        return None


def _document(number: int, pieces: list[Any], num_images: int) -> SourceSample:
    """Texts and images (paths) in order; "lost" counts those of `num_images` that are not on disk."""
    document: list[str | int] = []
    images: list[Path] = []
    for piece in pieces:
        if isinstance(piece, Path):
            document.append(len(images))
            images.append(piece)
        elif isinstance(piece, str) and piece.strip():
            document.append(piece.strip())
    lost = {"lost": num_images - len(images)} if num_images > len(images) else {}
    problem = "" if document else "is empty"
    return SourceSample(f"{number:09d}", images, {"document": document, **lost}, problem)


class _ImageFinder:
    """Finds images of documents by name, or by URL where img2dataset wrote a .json next to each."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.urls: dict[str, Path] | None = None

    def __call__(self, name: Any) -> Path | None:
        if not isinstance(name, str) or not name:
            return None
        if "://" in name:
            # only on demand: it reads a .json per image
            if self.urls is None:
                self.urls = dict(_downloaded_images(self.folder))
            return self.urls.get(name)
        try:
            path = file_of_image(self.folder, name)
        except BadSample:
            return None
        return path if path.is_file() else None


def _downloaded_images(folder: Path) -> Iterator[tuple[str, Path]]:
    """(URL, file) of the images that img2dataset downloaded."""
    for description in sorted(folder.rglob("*.json")):
        image = find_sibling(description, IMAGE_SUFFIXES)
        if image is not None:
            facts = read_json(description)
            if isinstance(facts, dict) and isinstance(facts.get("url"), str):
                yield facts["url"], image


def class_samples(source: Source) -> Iterator[SourceSample]:
    """A folder with a folder of images per class, as ImageNet's `train`; "label" is the number of the class's
    folder in sorted order.

    Images come in a random order that is always the same: training mixes samples of neighbouring tars only.
    """
    if not source.path.is_dir():
        raise UserError(f"{source.path} is a file; expected a folder with a folder of images per class.")
    classes = sorted(path for path in source.path.iterdir() if path.is_dir())
    labelled = [(path, label) for label, folder in enumerate(classes) for path in find_images(folder).images]
    Random(0).shuffle(labelled)
    used: set[str] = set()
    for path, label in labelled:
        name = path.relative_to(source.path).as_posix()
        yield SourceSample(unused_key(image_key(name), name, used), [path], {"label": label, "file": name})


SOURCE_FORMATS: dict[str, SourceFormat] = {
    "folder": SourceFormat(
        folder_samples,
        "a folder of images with .txt files, or with metadata.jsonl or metadata.csv (file_name, text).",
    ),
    "classes": SourceFormat(class_samples, "a folder with a folder of images per class."),
    "llava": SourceFormat(llava_samples, 'a JSON list of {"image": name or names, "conversations": [...]}.'),
    "obelics": SourceFormat(obelics_samples, 'JSON lines of {"texts": [...], "images": [...]}.'),
    "mmc4": SourceFormat(mmc4_samples, 'JSON lines of {"text_list": [...], "image_info": [...]}.'),
}
