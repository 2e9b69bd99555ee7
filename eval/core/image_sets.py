"""Image sets that are read lazily: a folder, an array in an .npz file, or the images of a run."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing

from .benchmark import Record, Task
from .image_files import list_images, read_sample_image
from .judge_pass import samples_with_images


class ImageSet(NamedTuple):
    """A set of images.

    Attributes:
        role: samples, reference, originals or reconstructions.
        names: one per image, used as cache key: it must change if the image does.
        load: i -> image, uint8 (H, W, 3); UserError if it is unreadable.
    """

    role: str
    names: list[str]
    load: Callable[[int], np.ndarray]


def images_of_folder(role: str, folder: Path, keep: Callable[[Path], bool] = lambda path: True) -> ImageSet:
    """All images below a folder, sorted by path.

    Raises:
        UserError: there are none.
    """
    paths = [path for path in list_images(folder) if keep(path)]
    if not paths:
        raise UserError(f"{folder} contains no images (.png, .jpg, ...).")
    # path and size stand for the content: hashing 50,000 images takes minutes
    names = [f"{p.relative_to(folder)} {p.stat().st_size}" for p in paths]
    return ImageSet(role, names, lambda i: np.asarray(read_sample_image(paths[i])))


def images_of_array(role: str, path: Path) -> ImageSet:
    """The images of an .npz file's `arr_0`, uint8 (N, H, W, 3)."""
    arrays = open_npz(path)
    if "arr_0" not in arrays.files:
        raise UserError(f"{path} has no arr_0, the array of images.")
    images = arrays["arr_0"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise UserError(
            f"{path}: arr_0 is {images.dtype} of shape {images.shape}; expected uint8 (N, H, W, 3)."
        )
    stamp = f"{path.name} {path.stat().st_size}"
    return ImageSet(role, [f"{stamp} {i}" for i in range(len(images))], lambda i: images[i])


def images_of_run(task: Task, records: dict[int, Record], out: Path) -> ImageSet:
    """The generated images of a run."""
    generated = samples_with_images(task.samples, records)
    # a file that was deleted after generation has size 0 here; loading it raises UserError
    paths = [out / records[s.index]["file"] for s in generated]
    names = [f"{s.id} {p.stat().st_size if p.exists() else 0}" for s, p in zip(generated, paths)]
    return ImageSet("samples", names, lambda i: np.asarray(read_sample_image(paths[i])))


def open_npz(path: Path):
    """Open an .npz file; UserError if it is missing or not an .npz."""
    try:
        # no pickle: an .npz of somebody else must not run code
        return np.load(existing(path), allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not an .npz file: {error}") from error
