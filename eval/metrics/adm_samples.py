"""ADM's `samples.npz`: all drawings as one array, so that its TensorFlow evaluator can be run on them."""

import contextlib
import hashlib
import zipfile
from pathlib import Path

import numpy as np

from open_unitok.core.errors import UserError

from .inception_features import ImageSet


def shuffled(count: int) -> np.ndarray:
    """The order of drawings: ADM's Inception Score takes blocks of 5000 and wants all classes in each."""
    return np.random.RandomState(2020).permutation(count)


def write_samples(images: ImageSet, path: Path) -> int:
    """Write `arr_0`, uint8 (N, H, W, 3), in shuffled order, one image in memory at a time; returns N.

    A drawing that cannot be read, or has another size than the first, has no place in the array. Every
    image is read twice, since N stands before them. A file that holds these very images stays.
    """
    stamp = hashlib.sha256("\n".join(images.names).encode()).hexdigest()
    if (known := count_in(path, stamp)) is not None:
        return known
    good, size = [], None
    for i in shuffled(len(images.names)).tolist():
        with contextlib.suppress(UserError):
            shape = images.load(i).shape
            size = size or shape
            if shape == size:
                good.append(i)
    if size is None:
        return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    about = {"descr": "|u1", "fortran_order": False, "shape": (len(good), *size)}
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("stamp.npy", "w") as file:
            np.lib.format.write_array(file, np.array(stamp))  # pyright: ignore[reportArgumentType]
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, about)  # pyright: ignore[reportArgumentType]
            for i in good:
                file.write(np.ascontiguousarray(images.load(i)).tobytes())
    temporary.replace(path)
    return len(good)


def count_in(path: Path, stamp: str) -> int | None:
    """How many images a file of this stamp holds; None where it is another or none."""
    if not path.exists():
        return None
    try:
        with np.load(path) as arrays:
            if str(arrays["stamp"]) != stamp:
                return None
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            np.lib.format.read_magic(file)  # pyright: ignore[reportArgumentType]
            return np.lib.format.read_array_header_1_0(file)[0][0]  # pyright: ignore[reportArgumentType]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
