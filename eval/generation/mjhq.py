"""MJHQ-30K: FID of generated images against the released ones, overall and by category."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from open_unitok.core.errors import UserError

from ..core.annotations import read_json_as, require_mostly_valid, require_text
from ..core.benchmark import Metric, Options, Record, Sample, Scored, Task, malformed_sample
from ..core.generated_images import (
    generation_metadata,
    require_generated_images,
    save_generated_images,
    unscored_records,
)
from ..core.image_sets import ImageSet, images_of_folder, images_of_run
from ..core.judge_pass import samples_with_images
from ..core.release_files import RELEASES, find_file, walk_folders
from ..metrics import fid, inception_features
from ..metrics.inception_features import StoredFeatures

answer = save_generated_images


def load(data: Path, settings: Options) -> Task:
    """One sample per entry of `meta_data.json`, {id: {category, prompt}}; the sample's id is category/id."""
    path = find_file(data, RELEASES["mjhq"].original, "list of MJHQ-30K's prompts")
    rows = list(read_json_as(dict, path).items())[: settings.limit]
    samples = []
    for k, (name, row) in enumerate(rows):
        where = f"{path}, {name}"
        try:
            image_id = f"{require_text(row, 'category', where)}/{name}"
            prompt = require_text(row, "prompt", where)
            samples.append(Sample(k, image_id, prompt, None, "generate", settings.seed + k))
        except UserError as error:
            samples.append(malformed_sample(k, name, error))
    metadata = generation_metadata(settings, "jpg") | {"split": f"{len(rows)} prompts"}
    return Task(require_mostly_valid(samples, path), {"data": path.parent}, metadata)


def _released_images(data: Path, reference: str, size: int) -> ImageSet:
    """The released images, resized to `size` (Lanczos) if they differ from it."""
    folder = Path(reference) if reference else data
    if not reference:
        # the zip of images is unpacked beside the list, or into a folder of its own
        below = (f for level in walk_folders(data) for f in level if f.name == "mjhq30k_imgs")
        folder = next(below, folder)
    found = images_of_folder("reference", folder)

    def load(i: int) -> np.ndarray:
        image = found.load(i)
        # no resampling if sizes agree: it would change the FID
        if image.shape[:2] == (size, size):
            return image
        return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS))

    # the size is part of the cache key
    return ImageSet("reference", [f"{name} {size}" for name in found.names], load)


def _first_size(images: ImageSet) -> int:
    """The height of the first image that can be read."""
    reason = ""
    for i in range(len(images.names)):
        try:
            return images.load(i).shape[0]
        except UserError as error:
            reason = reason or str(error)
    raise UserError(
        f"Not one of {len(images.names)} generated images can be read, the first because {reason}"
    )


def judge(
    task: Task, records: dict[int, Record], out: Path, scoring: Options, device: str, quiet: bool
) -> None:
    """Inception features of the generated images and, unless statistics are given, of the released ones."""
    generated = images_of_run(task, records, out)
    if not scoring.inception_weights or not generated.names:
        return
    sets = [generated]
    # an .npz contains their statistics
    if not scoring.reference.endswith(".npz"):
        sets.append(_released_images(task.truth["data"], scoring.reference, _first_size(generated)))
    variant = inception_features.choose_variant(scoring, "clean")
    inception_features.extract_inception_features(
        out, variant, scoring.inception_weights, sets, device, quiet
    )


def score(
    task: Task, records: dict[int, Record], folder: Path, run: dict[str, Any], scoring: Options
) -> Scored:
    """FID against all released images, and per category unless the reference is a file of statistics."""
    require_generated_images(task, records, folder)
    variant = inception_features.choose_variant(scoring, "clean")
    features = inception_features.require_inception_features(folder, variant, "samples")
    if scoring.reference.endswith(".npz"):
        reference = inception_features.reference_moments(scoring.reference, folder, variant)
        real = None
    else:
        real = inception_features.require_inception_features(folder, variant, "reference")
        reference = (real.moments(), "the released images, resized to the generated size")
        # later runs can pass this file as --reference
        inception_features.save_statistics(folder / "reference.npz", reference[0], variant)
    result = inception_features.feature_distances(folder, variant, features, reference, others=real)
    metrics, problems = result.metrics, result.problems
    # a killed judge pass: FID of a part of the images would be silently wrong
    without = len(samples_with_images(task.samples, records)) - features.n - len(features.bad)
    if without > 0:
        raise UserError(
            f"{folder}: {without} images have no Inception features. {inception_features.RERUN_HINT}"
        )
    if real is not None:
        problems += inception_features.unreadable_note(real, "released images")
        metrics |= _fid_by_category(task, records, features, real)
    absent = len(task.samples) - features.n
    problems += [f"{absent} images are missing from the FID"] * (absent > 0)
    reasons = [f"Inception variant {variant}; MJHQ-30K is published with clean-fid"] * (variant != "clean")
    reasons += [f"{absent} images are missing from the FID"] * (absent > 0)
    if real is not None and real.bad:
        reasons.append(f"{len(real.bad)} released images could not be read")
    per_sample, details = unscored_records(task, records), {"fid": result.details}
    return Scored(metrics, details, per_sample, not_comparable="; ".join(reasons), problems=problems)


def _fid_by_category(
    task: Task, records: dict[int, Record], generated: StoredFeatures, real: StoredFeatures
) -> dict[str, Metric]:
    """FID of each category with at least two generated and two released images."""
    samples = samples_with_images(task.samples, records)
    categories = [str(samples[i].id).split("/")[0] for i in generated.numbers()]
    # names are CATEGORY/FILE SIZE, as `images_of_folder` makes them
    real_categories = [name.split("/")[-2] if "/" in name else "" for name in real.names()]
    a, b = generated.column("pooled"), real.column("pooled")
    counts, real_counts = Counter(categories), Counter(real_categories)
    metrics = {}
    for name in sorted(counts):
        # a covariance needs at least two images
        if min(counts[name], real_counts[name]) < 2:
            continue
        moments = fid.compute_moments([a[np.array(categories) == name]])
        real_moments = fid.compute_moments([b[np.array(real_categories) == name]])
        distance = fid.frechet_distance(moments, real_moments)
        metrics[f"fid/{name}"] = Metric(distance, counts[name], None, "fid")
    return metrics
