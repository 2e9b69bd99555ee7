"""Inception features of whole folders: computed in pieces that survive a kill, and what FID says of them."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from open_unitok.core import distributed
from open_unitok.core.errors import UserError
from open_unitok.core.files import existing, sha256

from ..core.annotations import read_image
from ..core.harness import Metric, Record, Scoring, Task
from ..core.imagenet import SUFFIXES
from ..core.judge_pass import current_judge_pass, open_judge_pass, samples_with_images
from . import fid
from .inception_weights import Features, named_lineage, weights_file

PIECE, BATCH = 512, 32
HINT = "Run `unitok eval run` again with --inception-weights PATH: nothing is drawn again."


class ImageSet(NamedTuple):
    """A set of images: what it is in the run, a name for each that changes with it, and how it is read."""

    what: str
    names: list[str]
    load: Callable[[int], np.ndarray]  # the i-th, uint8 (H, W, 3); UserError where it cannot be read


def of_folder(what: str, folder: Path, keep: Callable[[Path], bool] = lambda path: True) -> ImageSet:
    """All images of a folder and its folders, in the order of their names.

    Raises:
        UserError: there are none.
    """
    paths = sorted(p for p in existing(folder).rglob("*") if p.suffix in SUFFIXES and keep(p))
    if not paths:
        raise UserError(f"{folder} holds no images ({', '.join(SUFFIXES[:4])}).")
    names = [f"{p.relative_to(folder)} {p.stat().st_size}" for p in paths]
    return ImageSet(what, names, lambda i: np.asarray(read_image(paths[i])))


def of_array(what: str, path: Path) -> ImageSet:
    """The images of an .npz file's `arr_0`, uint8 (N, H, W, 3)."""
    arrays = open_npz(path)
    if "arr_0" not in arrays.files:
        raise UserError(f"{path} holds no arr_0, the array of images.")
    images = arrays["arr_0"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise UserError(
            f"{path}: arr_0 is {images.dtype} of shape {images.shape}; uint8 (N, H, W, 3) is needed."
        )
    stamp = f"{path.name} {path.stat().st_size}"
    return ImageSet(what, [f"{stamp} {i}" for i in range(len(images))], lambda i: images[i])


def of_run(task: Task, rows: dict[int, Record], out: Path) -> ImageSet:
    """The run's drawings."""
    drawn = samples_with_images(task.samples, rows)
    paths = [out / rows[s.index]["file"] for s in drawn]
    names = [f"{s.id} {p.stat().st_size if p.exists() else 0}" for s, p in zip(drawn, paths)]
    return ImageSet("samples", names, lambda i: np.asarray(read_image(paths[i])))


def open_npz(path: Path):
    """An .npz file, or a UserError that names it."""
    try:
        return np.load(existing(path), allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no .npz file: {error}") from error


def extractor(lineage: str, file: Path, device: str) -> Callable[..., Features]:
    """`inception.extractor`, imported only where images are looked at: help and scores need no torch."""
    from open_unitok.eval.metrics import inception

    return inception.extractor(lineage, file, device)


def extract(
    out: Path, lineage: str, weights: str, sets: list[ImageSet], device: str = "cpu", quiet: bool = False
) -> None:
    """Compute what is missing of the features of `sets`, each rank its pieces of 512 images."""
    file = weights_file(lineage, weights)
    about = {"lineage": lineage, "weights": file.name, "fingerprint": sha256(file)}
    folder = open_judge_pass(out, f"inception-{lineage}", about)
    folder.mkdir(parents=True, exist_ok=True)
    todo = [
        (images, start)
        for images in sets
        for start in range(0, len(images.names), PIECE)
        if stored(folder, images, start) is None
    ]
    if distributed.is_main():
        for images in sets:  # of a set that has become smaller
            for path in folder.glob(f"{images.what}-*.npz"):
                if int(path.stem.rsplit("-", 1)[1]) >= len(images.names):
                    path.unlink()
    distributed.barrier()
    mine = todo[distributed.rank() :: distributed.world_size()]
    if mine:
        net = extractor(lineage, file, device)
        for images, start in tqdm(mine, desc=f"inception ({lineage})", unit=" pieces", disable=quiet):
            save_piece(folder, images, start, net)
    distributed.barrier()


def save_piece(folder: Path, images: ImageSet, start: int, net: Callable[..., Features]) -> None:
    """The features of the images from `start` on; one that cannot be read is noted, not skipped over."""
    count = min(PIECE, len(images.names) - start)
    parts: list[Features] = []
    good, bad = [], []
    for first in range(start, start + count, BATCH):
        batch = []
        for i in range(first, min(first + BATCH, start + count)):
            try:
                batch.append(images.load(i))
                good.append(i)
            except UserError as error:
                bad.append(f"{i} {error}")
        if batch:
            parts.append(net(batch))
    arrays = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in Features._fields
        if parts and getattr(parts[0], name) is not None
    }
    temporary = folder / f".{images.what}-{start:08d}.npz"
    np.savez(
        temporary,
        stamp=stamp_of(images, start),
        good=np.array(good, int),
        bad=np.array(bad, str),
        names=np.array([images.names[i] for i in good], str),
        **arrays,
    )
    temporary.replace(piece_of(folder, images.what, start))


def piece_of(folder: Path, what: str, start: int) -> Path:
    """Where the features of the images from `start` on lie."""
    return folder / f"{what}-{start:08d}.npz"


def stamp_of(images: ImageSet, start: int) -> str:
    """Changes when an image of this piece does."""
    return hashlib.sha256("\n".join(images.names[start : start + PIECE]).encode()).hexdigest()


def stored(folder: Path, images: ImageSet, start: int) -> Any:
    """The piece on disk if it is of these very images, else None."""
    path = piece_of(folder, images.what, start)
    if not path.exists():
        return None
    piece = open_npz(path)
    return piece if str(piece["stamp"]) == stamp_of(images, start) else None


class Stored(NamedTuple):
    """The features of one set as they lie on disk."""

    pieces: list[Path]
    n: int
    bad: list[str]  # why images are missing, one each

    def column(self, name: str) -> np.ndarray:
        """All rows of "pooled", "logits" or "spatial"."""
        return np.concatenate(list(self.batches(name)))

    def batches(self, name: str) -> Iterator[np.ndarray]:
        """The same, piece by piece."""
        for path in self.pieces:
            with np.load(path) as piece:
                if name in piece.files:
                    yield piece[name]

    def moments(self, name: str = "pooled") -> fid.Moments:
        """Mean and covariance."""
        return fid.compute_moments(self.batches(name))

    def numbers(self) -> np.ndarray:
        """The place in its set of every image that has features."""
        return np.concatenate(list(self.batches("good")))

    def names(self) -> list[str]:
        """The name of every image that has features."""
        return np.concatenate(list(self.batches("names"))).tolist()


def read(out: Path, lineage: str, what: str) -> Stored | None:
    """The features of one set, or None where none were computed."""
    named_lineage(lineage)
    found = current_judge_pass(out, f"inception-{lineage}")
    pieces = sorted(found[0].glob(f"{what}-*.npz")) if found else []
    if not pieces:
        return None
    n, bad = 0, []
    for path in pieces:
        with np.load(path) as piece:
            n += len(piece["good"])
            bad += piece["bad"].tolist()
    return Stored(pieces, n, bad)


def needed(out: Path, lineage: str, what: str) -> Stored:
    """`read`, or a UserError that says how to get them."""
    found = read(out, lineage, what)
    if found is None:
        raise UserError(f"{out} has no Inception features ({lineage}) of its {what}. {HINT}")
    return found


# -------------------------------------------------------------------------------------------------- reference


def reference_set(path: str) -> ImageSet | None:
    """The images behind --reference: a folder's, an .npz's `arr_0`; None where it has statistics alone."""
    file = existing(path, "It is what --reference names: a folder of images or an .npz of statistics.")
    if file.is_dir():
        return of_folder("reference", file)
    return of_array("reference", file) if "arr_0" in open_npz(file).files else None


def reference_moments(path: str, out: Path, lineage: str, name: str = "pooled") -> tuple[fid.Moments, str]:
    """Mean and covariance of the reference and what to say about them.

    Raises:
        UserError: an .npz of another lineage, or one without the statistics asked for.
    """
    file = existing(path)
    mean, covariance = ("mu_s", "sigma_s") if name == "spatial" else ("mu", "sigma")
    if file.is_dir() or "mu" not in (arrays := open_npz(file)).files:
        return needed(out, lineage, "reference").moments(name), f"images of {path}"
    if mean not in arrays.files:
        raise UserError(f"{path} holds no {mean} and {covariance}.")
    own = str(arrays["lineage"]) if "lineage" in arrays.files else ("adm" if "mu_s" in arrays.files else "")
    if own and own != lineage:
        raise UserError(
            f"{path} holds statistics of the lineage {own!r}; this benchmark uses {lineage!r}. "
            "Numbers of two Inception lineages are never mixed."
        )
    n = int(arrays["n"]) if "n" in arrays.files else 0
    told = "" if own else f"; the file names no lineage and is taken for {lineage}"
    return fid.Moments(arrays[mean].astype(np.float64), arrays[covariance].astype(np.float64), n), (
        f"statistics of {file.name}{told}"
    )


def save_statistics(path: Path, moments: fid.Moments, lineage: str) -> None:
    """Statistics that a later run takes as its --reference."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    np.savez(
        temporary, mu=moments.mean, sigma=moments.covariance, n=np.array(moments.n), lineage=np.array(lineage)
    )
    temporary.replace(path)


# ---------------------------------------------------------------------------------------------------- scores


class Distances(NamedTuple):
    """Numbers by name, what belongs beside them, and what has to be said."""

    metrics: dict[str, Metric]
    details: dict[str, Any]
    problems: list[str]


def distances(
    out: Path,
    lineage: str,
    samples: Stored,
    reference: tuple[fid.Moments, str],
    prefix: str = "",
    others: Stored | None = None,
) -> Distances:
    """FID, KID against `others` where both are 1000, Inception Score; no intervals: they are not means."""
    metrics = {
        f"{prefix}fid": Metric(fid.frechet_distance(samples.moments(), reference[0]), samples.n, None, "fid")
    }
    details = {
        "lineage": lineage,
        "lineage note": named_lineage(lineage).note,
        "reference": reference[1],
        "reference images": reference[0].n or "not said",
        "images": samples.n,
        "inception": (current_judge_pass(out, f"inception-{lineage}") or (None, {}))[1],
    }
    if others is not None and min(samples.n, others.n) >= 1000:
        mean, deviation = fid.kid(samples.column("pooled"), others.column("pooled"))
        metrics[f"{prefix}kid"] = Metric(mean, samples.n, None, "kid")
        details["kid deviation over 100 subsets of 1000"] = deviation
    if lineage in ("torch-fidelity", "pytorch-fid") and samples.n >= 10:
        mean, deviation = fid.inception_score(samples.column("logits"))
        metrics["inception_score"] = Metric(mean, samples.n, None, "score")
        details["inception_score deviation over 10 splits"] = deviation
    problems = [f"{samples.n} images are few: FID is biased upwards below some 10,000"] * (samples.n < 10_000)
    return Distances(metrics, details, problems + unread(samples, "images"))


def unread(found: Stored, what: str) -> list[str]:
    """A line about those that could not be read."""
    if not found.bad:
        return []
    reason = found.bad[0].split(" ", 1)[1]
    return [f"{len(found.bad)} {what} could not be read, the first because {reason} (left out)"]


def lineage_of(scoring: Scoring, default: str) -> str:
    """The lineage asked for, else the benchmark's own."""
    named_lineage(scoring.inception_variant or default)
    return scoring.inception_variant or default
