"""Write `samples.npz`, the input of ADM's TensorFlow evaluator: all generated images as one array."""

import contextlib
import hashlib
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from open_unitok.core.errors import UserError
from open_unitok.core.files import write_atomic

from ..core.image_sets import ImageSet


def adm_order(count: int) -> np.ndarray:
    """A fixed permutation of the images."""
    # ADM's Inception Score uses blocks of 5000 images, each of which must contain all classes
    return np.random.RandomState(2020).permutation(count)


def write_adm_samples(images: ImageSet, path: Path) -> int:
    """Write `arr_0`, uint8 (N, H, W, 3), in shuffled order, one image in memory at a time; returns N.

    Unreadable images, and those that differ in size from the first, are left out. An existing file of the
    same images is kept.
    """
    stamp = hashlib.sha256("\n".join(images.names).encode()).hexdigest()
    if (known := _stored_count(path, stamp)) is not None:
        return known
    # first pass: the header of the array needs N, so every image is read twice
    good, size = [], None
    for i in adm_order(len(images.names)).tolist():
        with contextlib.suppress(UserError):
            shape = images.load(i).shape
            size = size or shape
            if shape == size:
                good.append(i)
    if size is None:
        return 0
    about = {"descr": "|u1", "fortran_order": False, "shape": (len(good), *size)}

    # not np.savez, which needs all images in memory: 9.8 GB for 50,000 of 256 x 256
    def write(target: BinaryIO) -> None:
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open("stamp.npy", "w") as file:
                np.lib.format.write_array(file, np.array(stamp))  # pyright: ignore[reportArgumentType]
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, about)  # pyright: ignore[reportArgumentType]
                for i in good:
                    file.write(np.ascontiguousarray(images.load(i)).tobytes())

    write_atomic(path, write)
    return len(good)


def _stored_count(path: Path, stamp: str) -> int | None:
    """Number of images in a file with this stamp; None if the file is missing, damaged or of other images."""
    if not path.exists():
        return None
    try:
        with np.load(path) as arrays:
            if str(arrays["stamp"]) != stamp:
                return None
        # the header only: np.load would read the whole array
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            np.lib.format.read_magic(file)  # pyright: ignore[reportArgumentType]
            return np.lib.format.read_array_header_1_0(file)[0][0]  # pyright: ignore[reportArgumentType]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
