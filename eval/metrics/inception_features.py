"""Features of image sets, resumable in pieces of 512 images; distances between Inception features."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from open_unitok.core import distributed
from open_unitok.core.errors import UserError
from open_unitok.core.files import existing, sha256, write_atomic

from ..core.benchmark import Metric, Options
from ..core.image_sets import ImageSet, images_of_array, images_of_folder, open_npz
from ..core.judge_pass import current_judge_pass, open_judge_pass
from . import fid
from .inception_weights import Features, find_inception_variant, find_inception_weights

PIECE_SIZE, _BATCH = 512, 32
_KEPT = "images and features are kept."
RERUN_HINT = "Run `unitok eval run` again with --inception-weights PATH: generated images are kept."


def extract_inception_features(
    out: Path, variant: str, weights: str, sets: list[ImageSet], device: str = "cpu", quiet: bool = False
) -> None:
    """Compute the missing Inception features of `sets`."""
    file = find_inception_weights(variant, weights)
    about = {"variant": variant, "weights": file.name, "fingerprint": sha256(file)}

    def load() -> Callable[[list[np.ndarray]], Features]:
        from .inception import load_extractor  # here: it loads torch, which scoring does not need

        return load_extractor(variant, file, device)

    extract_features(out, f"inception-{variant}", about, sets, load, quiet)


def extract_features(
    out: Path,
    kind: str,
    about: dict[str, Any],
    sets: list[ImageSet],
    load: Callable[[], Callable[[list[np.ndarray]], Features]],
    quiet: bool = False,
) -> None:
    """Compute the missing features of `sets`, in pieces of 512 images that are divided among the ranks.

    Args:
        kind, about: see `open_judge_pass`.
        load: -> the network, from images (H, W, 3) of uint8 to features; called only if features are missing.
    """
    # the sizes of the sets tell a complete pass from a killed one, also where only files are left
    folder = open_judge_pass(out, kind, about | {"images": {s.role: len(s.names) for s in sets}})
    folder.mkdir(parents=True, exist_ok=True)
    # a stored piece is valid if it was computed from the same names, which contain path and size
    todo = [
        (images, start)
        for images in sets
        for start in range(0, len(images.names), PIECE_SIZE)
        if _stored_piece(folder, images, start) is None
    ]
    # one rank removes stale pieces; the barrier keeps the others from reading them
    if distributed.is_main():
        for images in sets:  # pieces beyond the end, if a set has become smaller
            for path in folder.glob(f"{images.role}-*.npz"):
                if int(path.stem.rsplit("-", 1)[1]) >= len(images.names):
                    path.unlink()
    distributed.barrier()
    # strided, so that ranks finish together although sets differ in image size
    mine = todo[distributed.rank() :: distributed.world_size()]
    if mine:
        net = load()
        for images, start in tqdm(mine, desc=kind, unit=" pieces", disable=quiet):
            _save_piece(folder, images, start, net)
    distributed.barrier()


def _save_piece(folder: Path, images: ImageSet, start: int, net: Callable[..., Features]) -> None:
    """Compute and save the features of one piece; unreadable images are recorded with the error."""
    count = min(PIECE_SIZE, len(images.names) - start)
    parts: list[Features] = []
    good, bad = [], []
    for first in range(start, start + count, _BATCH):
        batch = []
        for i in range(first, min(first + _BATCH, start + count)):
            try:
                batch.append(images.load(i))
                good.append(i)
            except UserError as error:
                bad.append(f"{i} {error}")
        if batch:
            parts.append(net(batch))
    # variants without logits or spatial features leave those arrays out
    arrays = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in Features._fields
        if parts and getattr(parts[0], name) is not None
    }
    arrays |= {
        "stamp": np.array(_piece_stamp(images, start)),
        "good": np.array(good, int),
        "bad": np.array(bad, str),
        "names": np.array([images.names[i] for i in good], str),
    }
    write_atomic(_piece_path(folder, images.role, start), lambda file: np.savez(file, **arrays))  # pyright: ignore


def _piece_path(folder: Path, role: str, start: int) -> Path:
    """The file of the piece whose first image has index `start`."""
    return folder / f"{role}-{start:08d}.npz"


def _piece_stamp(images: ImageSet, start: int) -> str:
    """A hash of the names of the images in a piece."""
    return hashlib.sha256("\n".join(images.names[start : start + PIECE_SIZE]).encode()).hexdigest()


def _stored_piece(folder: Path, images: ImageSet, start: int) -> Any:
    """The piece on disk, or None if it is missing or of other images."""
    path = _piece_path(folder, images.role, start)
    if not path.exists():
        return None
    piece = open_npz(path)
    return piece if str(piece["stamp"]) == _piece_stamp(images, start) else None


class StoredFeatures(NamedTuple):
    """Features of one image set on disk."""

    pieces: list[Path]
    n: int
    bad: list[str]  # "index error" of each unreadable image

    def column(self, name: str) -> np.ndarray:
        """All features of a kind: "pooled", "logits" or "spatial"."""
        return np.concatenate(list(self.batches(name)))

    def batches(self, name: str) -> Iterator[np.ndarray]:
        """Features of a kind, piece by piece."""
        for path in self.pieces:
            with np.load(path) as piece:
                if name in piece.files:
                    yield piece[name]

    def moments(self, name: str = "pooled") -> fid.Moments:
        """Mean and covariance of a kind of features, without loading all of them."""
        return fid.compute_moments(self.batches(name))

    def numbers(self) -> np.ndarray:
        """The indices of the images that have features."""
        return np.concatenate(list(self.batches("good")))

    def names(self) -> list[str]:
        """The names of the images that have features."""
        return np.concatenate(list(self.batches("names"))).tolist()


def read_inception_features(out: Path, variant: str, role: str) -> StoredFeatures | None:
    """The Inception features of one set, or None if none were computed."""
    find_inception_variant(variant)
    return read_features(out, f"inception-{variant}", role)


def read_features(out: Path, kind: str, role: str) -> StoredFeatures | None:
    """The features of one set by the current network of a kind, or None if none were computed."""
    found = current_judge_pass(out, kind)
    pieces = sorted(found[0].glob(f"{role}-*.npz")) if found else []
    if not pieces:
        return None
    n, bad = 0, []
    # counts and errors only: features stay on disk until a metric needs them
    for path in pieces:
        with np.load(path) as piece:
            n += len(piece["good"])
            bad += piece["bad"].tolist()
    return StoredFeatures(pieces, n, bad)


def require_all_features(out: Path, kind: str, *sets: StoredFeatures | None) -> dict[str, Any]:
    """The description of a feature pass.

    Raises:
        UserError: images have no features, because the pass was killed.
    """
    about = (current_judge_pass(out, kind) or (None, {}))[1]
    for found in filter(None, sets):
        role = found.pieces[0].name.rsplit("-", 1)[0]
        without = about.get("images", {}).get(role, 0) - found.n - len(found.bad)
        if without > 0:
            raise UserError(f"{out}: {without} images ({role}) have no features ({kind}). Run again: {_KEPT}")
    return about


def require_inception_features(out: Path, variant: str, role: str) -> StoredFeatures:
    """As `read_inception_features`, but UserError if none were computed."""
    found = read_inception_features(out, variant, role)
    if found is None:
        raise UserError(f"{out} has no Inception features ({variant}) of its {role}. {RERUN_HINT}")
    if found.n == 0:
        reason = found.bad[0].split(" ", 1)[1]
        raise UserError(
            f"{out}: not one of its {len(found.bad)} {role} can be read, the first because {reason}"
        )
    return found


# -------------------------------------------------------------------------------------------------- reference


def reference_images(path: str) -> ImageSet | None:
    """The images of --reference, a folder or an .npz with `arr_0`; None if it holds only statistics."""
    file = existing(path, "--reference must be a folder of images or an .npz.")
    if file.is_dir():
        return images_of_folder("reference", file)
    return images_of_array("reference", file) if "arr_0" in open_npz(file).files else None


def reference_moments(path: str, out: Path, variant: str, name: str = "pooled") -> tuple[fid.Moments, str]:
    """Mean and covariance of the reference, and a description of their source.

    Raises:
        UserError: an .npz of another variant, or without the statistics needed.
    """
    file = existing(path)
    mean, covariance = ("mu_s", "sigma_s") if name == "spatial" else ("mu", "sigma")
    # images without statistics: the judge pass has computed their features
    if file.is_dir() or "mu" not in (arrays := open_npz(file)).files:
        return require_inception_features(out, variant, "reference").moments(name), f"images of {path}"
    if mean not in arrays.files:
        raise UserError(f"{path} has no {mean} and {covariance}.")
    # ADM's released files have no variant, but only they have statistics of sFID
    own = str(arrays["variant"]) if "variant" in arrays.files else ("adm" if "mu_s" in arrays.files else "")
    if own and own != variant:
        raise UserError(
            f"{path} holds statistics of the Inception variant {own!r}; this benchmark uses {variant!r}. "
            "Features of two variants are not comparable."
        )
    n = int(arrays["n"]) if "n" in arrays.files else 0
    assumed = "" if own else f"; the file has no variant; {variant} is assumed"
    return fid.Moments(arrays[mean].astype(np.float64), arrays[covariance].astype(np.float64), n), (
        f"statistics of {file.name}{assumed}"
    )


def save_statistics(path: Path, moments: fid.Moments, variant: str) -> None:
    """Save statistics that a later run can use as --reference."""
    arrays = {"mu": moments.mean, "sigma": moments.covariance, "n": moments.n, "variant": variant}
    write_atomic(path, lambda file: np.savez(file, **{k: np.asarray(v) for k, v in arrays.items()}))  # pyright: ignore


# ---------------------------------------------------------------------------------------------------- scores


class FeatureDistances(NamedTuple):
    """Metrics by name, details and problems for the result."""

    metrics: dict[str, Metric]
    details: dict[str, Any]
    problems: list[str]


def feature_distances(
    out: Path,
    variant: str,
    samples: StoredFeatures,
    reference: tuple[fid.Moments, str],
    prefix: str = "",
    others: StoredFeatures | None = None,
) -> FeatureDistances:
    """FID; KID against `others` if both have 1000 images; Inception Score. No bootstrap intervals."""
    metrics = {
        f"{prefix}fid": Metric(fid.frechet_distance(samples.moments(), reference[0]), samples.n, None, "fid")
    }
    details = {
        "variant": variant,
        "variant note": find_inception_variant(variant).note,
        "reference": reference[1],
        "reference images": reference[0].n or "unknown",
        "images": samples.n,
        "inception": (current_judge_pass(out, f"inception-{variant}") or (None, {}))[1],
    }
    # the published protocol of KID uses subsets of 1000
    if others is not None and min(samples.n, others.n) >= 1000:
        mean, deviation = fid.kid(samples.column("pooled"), others.column("pooled"))
        metrics[f"{prefix}kid"] = Metric(mean, samples.n, None, "kid")
        details["kid deviation over 100 subsets of 1000"] = deviation
    # adm: imagenet_generation computes its score in blocks; clean: the network has no logits
    if variant in ("torch-fidelity", "pytorch-fid") and samples.n >= 10:
        mean, deviation = fid.inception_score(samples.column("logits"))
        metrics["inception_score"] = Metric(mean, samples.n, None, "score")
        details["inception_score deviation over 10 splits"] = deviation
    # the bias of FID is proportional to 1 / n; published tables use 5,000 to 50,000 images
    problems = [f"{samples.n} images are few: FID is biased upwards below about 10,000"] * (
        samples.n < 10_000
    )
    return FeatureDistances(metrics, details, problems + unreadable_note(samples, "images"))


def unreadable_note(found: StoredFeatures, role: str) -> list[str]:
    """A warning about unreadable images."""
    if not found.bad:
        return []
    reason = found.bad[0].split(" ", 1)[1]
    return [f"{len(found.bad)} {role} could not be read, the first because {reason} (left out)"]


def choose_variant(scoring: Options, default: str) -> str:
    """The variant of the options, else that of the benchmark."""
    find_inception_variant(scoring.inception_variant or default)
    return scoring.inception_variant or default
