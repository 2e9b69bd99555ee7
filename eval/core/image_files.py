"""Image files of benchmarks: find, read (from folders, tar files or base64 text) and save.

The path of an image inside a tar (webdataset layout) treats the tar as a folder: shard.tar/000001.jpg.
"""

import base64
import binascii
import functools
import sys
import tarfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing
from open_unitok.core.image_names import IMAGE_SUFFIXES, find_images, find_sibling, is_image_name

from .benchmark import Record, Sample
from .parquet import ParquetImage

_PROBES = 16  # images that are read before the first question


class Base64Image(NamedTuple):
    """An image stored as base64 text in a table."""

    name: str
    text: str

    def __str__(self) -> str:
        return self.name  # not the data, which would land in result files

    __repr__ = __str__


class ImageList(NamedTuple):
    """The images of a question that has several, in the order in which the model reads them."""

    images: tuple[Path | Base64Image | ParquetImage, ...]

    @property
    def name(self) -> str:
        """The names of all images, which identify the question's cluster."""
        return "+".join(image.name for image in self.images)

    def __str__(self) -> str:
        return str(self.images[0])  # the one that a report shows


def read_sample_image(path: Path | Base64Image | ParquetImage | None) -> Image.Image:
    """Read an image as RGB.

    Raises:
        UserError: the file is missing or not a readable image.
    """
    from open_unitok.tokenizer.images import load_image  # here: it loads torch, which scoring does not need

    if isinstance(path, Base64Image):
        try:
            return load_image(base64.b64decode(path.text, validate=True))
        except (UserError, binascii.Error) as error:
            raise UserError(f"{path.name} is not a readable image: {error}") from error
    if isinstance(path, ParquetImage):
        try:
            return load_image(path.read())
        except UserError as error:
            raise UserError(f"{path} is not a readable image: {error}") from error
    assert path is not None  # callers skip samples without an image
    if inside := split_tar_path(path):
        try:
            return load_image(read_tar_member(*inside))
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    if not path.exists():
        raise UserError(f"{path} does not exist.")
    return load_image(path)


def open_images(batch: list[Sample]) -> tuple[list[Record], dict[int, Image.Image]]:
    """Per sample a record, with the error if the image is unreadable; readable images by batch position."""
    records: list[Record] = [{} for _ in batch]
    images = {}
    for i, sample in enumerate(batch):
        try:
            images[i] = read_sample_image(sample.image)
        except UserError as error:
            records[i] = {"error": str(error)}
    return records, images


def refuse_unreadable(benchmark: str, samples: Sequence[Sample], done: Collection[tuple[int, str]]) -> None:
    """Check before the first question that most images are there.

    Every path is looked up, and some of the images that exist are read: a folder of Git LFS pointers or of
    error pages has all names.

    Args:
        done: keys of samples that have an answer; their images are not needed any more.

    Raises:
        UserError: more than half of the images are missing or cannot be read.
    """
    images = dict.fromkeys(image for s in samples for image in _images_of(s))
    todo = dict.fromkeys(image for s in samples if s.key not in done for image in _images_of(s))
    present, missing = [], []
    for image in todo:
        (missing if _is_missing(image) else present).append(image)
    step = max(1, len(present) // _PROBES)
    probed = present[::step]
    reasons = [f"{image} does not exist" for image in missing[:1]]
    unreadable = 0
    for image in probed:
        try:
            read_sample_image(image)
        except UserError as error:
            unreadable += 1
            reasons.append(str(error).removesuffix("."))
    # those that were read stand for the others
    count = len(missing) + (len(present) * unreadable // len(probed) if probed else 0)
    if count and 2 * count > len(images):
        amount = "none" if count == len(images) else f"only {len(images) - count}"
        raise UserError(
            f"{benchmark}: {amount} of {len(images)} images can be read, the first problem: {reasons[0]}. "
            "Nothing was asked: put the images in place (eval/README.md lists the folders) and run again."
        )


def _images_of(sample: Sample) -> tuple[Any, ...]:
    """The images of a sample, none of a malformed one."""
    if sample.malformed or sample.image is None:
        return ()
    return sample.image.images if isinstance(sample.image, ImageList) else (sample.image,)


def _is_missing(image: Any) -> bool:
    """Whether there is certainly no such image; does not read it."""
    if isinstance(image, Path):
        return not image.exists() and split_tar_path(image) is None
    return isinstance(image, Base64Image) and not image.text.strip()


def save_image(pixels: np.ndarray, path: Path) -> None:
    """Save uint8 (H, W, 3) as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def save_base64_image(image: Base64Image, out: Path) -> str:
    """Save the image below `out`, for the report; returns its path relative to `out`."""
    path = out / "images" / image.name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(image.text))
    return f"images/{image.name}"


def image_path(folders: Sequence[Path], name: str) -> Path:
    """The path of `name` in the first folder that contains it, else in the first folder."""
    # a missing file is reported per sample when it is read
    paths = [folder / name for folder in folders]
    return next((path for path in paths if path.exists()), paths[0])


def image_path_by_stem(
    folders: Sequence[Path], stem: str, suffixes: Sequence[str] = (".jpg", ".png", ".jpeg")
) -> Path:
    """As `image_path`, for a file name without its suffix."""
    # "" first: some releases ship images without a suffix
    paths = [folder / f"{stem}{suffix}" for folder in folders for suffix in ("", *suffixes)]
    if exact := next((path for path in paths if path.is_file()), None):
        return exact
    # any other suffix, in any case
    places = [folder / f"{stem}.any" for folder in folders]
    siblings = (find_sibling(place, IMAGE_SUFFIXES) for place in places if place.parent.is_dir())
    return next(filter(None, siblings), paths[1])


def list_images(folder: Path, recursive: bool = True) -> list[Path]:
    """The images below a folder, sorted; what is left out is printed.

    Raises:
        UserError: the folder does not exist.
    """
    found = find_images(existing(folder), recursive)
    if note := found.note(folder):
        print(f"{folder}: {note}", file=sys.stderr)
    return found.images


# ------------------------------------------------------------------------------------------------- tar files


# cached: one pass over the headers per tar instead of one per image
@functools.lru_cache(maxsize=64)
def tar_member_offsets(tar: Path) -> dict[str, tuple[int, int]]:
    """Member -> (offset, size) of all files in a tar, in the order of the tar.

    Raises:
        UserError: not an uncompressed tar file, or truncated.
    """
    try:
        # "r:" rejects compressed tars, in which offsets are useless
        with tarfile.open(tar, "r:") as file:
            found = {m.name: (m.offset_data, m.size) for m in file if m.isfile()}
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{tar} is not a readable tar file: {error}") from error
    # tarfile does not notice a truncated last member
    end = max((offset + size for offset, size in found.values()), default=0)
    if end > tar.stat().st_size:
        raise UserError(f"{tar} is truncated: its last member ends beyond the end of the file.")
    return found


def split_tar_path(path: Path) -> tuple[Path, str] | None:
    """shard.tar/member -> (shard.tar, member); None for a path outside tar files."""
    for parent in path.parents:
        if parent.suffix == ".tar" and parent.is_file():
            return parent, path.relative_to(parent).as_posix()
    return None


def read_tar_member(tar: Path, member: str) -> bytes:
    """The bytes of one member; UserError if it is missing."""
    members = tar_member_offsets(existing(tar))
    if member not in members:
        raise UserError(f"{tar} has no member {member}.")
    offset, size = members[member]
    with open(tar, "rb") as file:
        file.seek(offset)
        return file.read(size)


def tar_images(tar: Path) -> list[Path]:
    """Paths (shard.tar/member) of the images, in the order of the tar, without macOS's ._x.jpg."""
    return [
        tar / name
        for name in tar_member_offsets(tar)
        if is_image_name(name) and not Path(name).name.startswith(".")
    ]


def read_tar_sibling(image: Path, suffix: str) -> bytes | None:
    """The member with the same key and another suffix, e.g. the class in .cls; None if there is none."""
    inside = split_tar_path(image)
    if inside is None:
        return None
    tar, name = inside
    folder, _, file = name.rpartition("/")
    # webdataset: the key of a sample is its file name up to the first period
    key = (folder + "/" if folder else "") + file.split(".")[0]
    return read_tar_member(tar, key + suffix) if key + suffix in tar_member_offsets(tar) else None
