"""How data sets lie on people's disks: each layout as a stream of items for `unitok data convert`.

An item's info is what `KEY.json` will say: {"captions": [str]} and perhaps "long_caption", "short_caption";
{"conversations": [[{"from": "human" | "gpt", "value"}]]}; or {"document": [str | int]}, whose numbers are
those of the images.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from open_unitok.core.errors import UserError
from open_unitok.core.files import read_json

from .records import conversation_turns, image_key, image_names, read_records
from .tar_index import BadSample

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FILE_KEYS = ("file_name", "file", "image", "image_path", "path", "filename")
CAPTION_KEYS = ("captions", "caption", "text", "prompt")
METADATA = ("metadata.jsonl", "metadata.csv")


class Source(NamedTuple):
    """Where a data set lies, and what the user said about it."""

    path: Path
    images: Path | None = None  # folder that image names are relative to
    column: str | None = None  # name of the caption's key

    @property
    def folder(self) -> Path:
        """Where the images are."""
        return self.images or (self.path if self.path.is_dir() else self.path.parent)


class Item(NamedTuple):
    """One sample to be; `problem` says why it cannot be one."""

    key: str
    pictures: list[Path]
    info: dict[str, Any]
    problem: str = ""


class Layout(NamedTuple):
    """A stream of items, the same on every call; and what was looked for."""

    items: Callable[[Source], Iterator[Item]]
    wanted: str


# ---- images with captions: a folder with .txt files, or with metadata.jsonl or .csv ----------------------


def folder_items(source: Source) -> Iterator[Item]:
    """A folder with `x.jpg` and `x.txt` (a caption per line), or with metadata; or a metadata file itself."""
    seen: Counter[str] = Counter()
    for name, info, problem in _named_images(source):
        key = image_key(name)
        seen[key] += 1
        if seen[key] > 1:  # a.b.jpg beside a_b.jpg
            key = f"{key}-{seen[key]}"
        yield Item(key, [source.folder / name], {**info, "file": name}, problem)


def _named_images(source: Source) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(name of the image, what is said of it, problem)."""
    if source.path.is_dir():
        metadata = next((source.path / m for m in METADATA if (source.path / m).exists()), None)
        if metadata is None:
            yield from _images_with_texts(source.path)
            return
    else:
        metadata = source.path
    for number, row in enumerate(read_records(metadata), 1):
        name = next((row[key] for key in FILE_KEYS if isinstance(row.get(key), str) and row[key]), None)
        if name is None:
            has = ", ".join(map(str, row)) or "nothing"
            yield f"{metadata.name}_{number}", {}, f"names no image ({FILE_KEYS[0]}); it has {has}"
        else:
            yield name, _captions_of(row, source.column), ""


def _images_with_texts(folder: Path) -> Iterator[tuple[str, dict[str, Any], str]]:
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or path.suffix.lower() not in IMAGES or not path.is_file():
            continue
        captions, problem = [], ""
        text = next((t for e in (".txt", ".caption") if (t := path.with_suffix(e)).is_file()), None)
        if text is not None:
            try:
                lines = text.read_text(encoding="utf-8-sig").splitlines()
                captions = [line.strip() for line in lines if line.strip()]
            except UnicodeDecodeError as error:
                problem = f"{text} is not UTF-8: {error}"
        yield relative.as_posix(), {"captions": captions}, problem


def _captions_of(row: dict[str, Any], column: str | None) -> dict[str, Any]:
    """The captions that a row of metadata gives."""
    if column is not None and column not in row:
        raise UserError(f"--column is {column}, but there are only: {', '.join(map(str, row))}.")
    value = next((row[key] for key in ((column,) if column else CAPTION_KEYS) if row.get(key)), [])
    texts = value if isinstance(value, list) else [value]
    extra = {key: str(row[key]) for key in ("long_caption", "short_caption") if row.get(key)}
    return {"captions": [str(text).strip() for text in texts if str(text).strip()], **extra}


# ---- conversations as LLaVA writes them --------------------------------------------------------------------


def llava_items(source: Source) -> Iterator[Item]:
    """LLaVA's JSON: [{"id", "image": name | [names], "conversations": [{"from", "value"}]}, ...]."""
    for number, row in enumerate(read_records(source.path)):
        try:
            names = image_names(row)
            info = {"conversations": [conversation_turns(row, len(names))], "id": str(row.get("id", number))}
            yield Item(f"{number:09d}", [source.folder / name for name in names], info)
        except BadSample as error:
            yield Item(f"{number:09d}", [], {}, str(error))


# ---- interleaved documents ---------------------------------------------------------------------------------


def obelics_items(source: Source) -> Iterator[Item]:
    """OBELICS: {"texts": [str | null], "images": [null | name]}, one of the two at each place."""
    find = _Finder(source.folder)
    for number, row in enumerate(read_records(source.path)):
        texts, images = (_parsed(row.get(name)) for name in ("texts", "images"))
        if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
            yield Item(f"{number:09d}", [], {}, 'has no "texts" and "images" of the same length')
            continue
        pieces = [find(image) if image else text for text, image in zip(texts, images)]
        yield _document(number, pieces, sum(map(bool, images)))


def mmc4_items(source: Source) -> Iterator[Item]:
    """MMC4: {"text_list": [str], "image_info": [{"image_name", "matched_text_index"}]}; an image comes before
    the sentence that it matches."""
    find = _Finder(source.folder)
    for number, row in enumerate(read_records(source.path)):
        texts, infos = row.get("text_list"), row.get("image_info", [])
        if not (
            isinstance(texts, list) and isinstance(infos, list) and all(isinstance(i, dict) for i in infos)
        ):
            yield Item(f"{number:09d}", [], {}, 'has no "text_list" and "image_info"')
            continue
        pieces: list[Any] = []
        for place, text in enumerate(texts):
            matching = [i for i in infos if i.get("matched_text_index") == place]
            pieces += [find(i.get("image_name")) or find(i.get("raw_url")) for i in matching]
            pieces.append(text)
        yield _document(number, pieces, len(infos))


def _parsed(value: Any) -> Any:
    """A list, or the JSON of one (as tables keep it)."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return None


def _document(number: int, pieces: list[Any], images: int) -> Item:
    """Texts and images (paths) in their order; how many of the `images` are not on disk is noted."""
    document: list[str | int] = []
    pictures: list[Path] = []
    for piece in pieces:
        if isinstance(piece, Path):
            document.append(len(pictures))
            pictures.append(piece)
        elif isinstance(piece, str) and piece.strip():
            document.append(piece.strip())
    lost = {"lost": images - len(pictures)} if images > len(pictures) else {}
    return Item(f"{number:09d}", pictures, {"document": document, **lost}, "" if document else "is empty")


class _Finder:
    """Images of documents by name, or by URL where img2dataset has left a .json beside each."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.urls: dict[str, Path] | None = None

    def __call__(self, name: Any) -> Path | None:
        if not isinstance(name, str) or not name:
            return None
        if "://" in name:
            if self.urls is None:
                self.urls = dict(_downloaded(self.folder))
            return self.urls.get(name)
        path = self.folder / name
        return path if path.is_file() else None


def _downloaded(folder: Path) -> Iterator[tuple[str, Path]]:
    for described in sorted(folder.rglob("*.json")):
        picture = next((p for e in IMAGES if (p := described.with_suffix(e)).is_file()), None)
        if picture is not None:
            facts = read_json(described)
            if isinstance(facts, dict) and isinstance(facts.get("url"), str):
                yield facts["url"], picture


LAYOUTS: dict[str, Layout] = {
    "folder": Layout(
        folder_items,
        "a folder with images beside .txt files, or with metadata.jsonl or metadata.csv (file_name, text).",
    ),
    "llava": Layout(llava_items, 'a JSON list of {"image": name or names, "conversations": [...]}.'),
    "obelics": Layout(obelics_items, 'JSON lines of {"texts": [...], "images": [...]}.'),
    "mmc4": Layout(mmc4_items, 'JSON lines of {"text_list": [...], "image_info": [...]}.'),
}
