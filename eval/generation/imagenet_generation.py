"""Class-conditional ImageNet with ADM's metrics: gFID, sFID, Inception Score, precision and recall."""

from pathlib import Path
from typing import Any

import numpy as np

from open_unitok.core import distributed
from open_unitok.core.errors import UserError
from open_unitok.core.files import existing

from ..core import imagenet
from ..core.benchmark import Metric, Options, Record, Sample, Scored, Task
from ..core.bootstrap import bootstrap, mean_columns
from ..core.generated_images import (
    generation_metadata,
    require_generated_images,
    save_generated_images,
    unscored_records,
)
from ..core.image_sets import images_of_run
from ..core.release_files import RELEASES, find_file
from ..metrics import fid, inception_features
from ..metrics.adm_samples import adm_order, write_adm_samples

_IMAGES = 50_000  # the published number

answer = save_generated_images


def load(data: Path, settings: Options) -> Task:
    """50,000 images of uniformly sampled classes, as in LlamaGen; a sample also has a prompt with the class's
    name, for models that read text."""
    count = settings.limit or _IMAGES
    # all labels from one generator, so that they do not depend on the number of ranks
    labels = np.random.default_rng(settings.seed).integers(0, 1000, count).tolist()
    names = imagenet.class_names()
    samples = [
        Sample(i, f"{i:06d}", f"a photo of a {names[c]}.", None, "generate", settings.seed + i, c)
        for i, c in enumerate(labels)
    ]
    metadata = generation_metadata(settings, "png") | {
        "classes": 1000,
        "labels": "uniform at random",
        "split": "ImageNet 256, training set",
    }
    return Task(samples, {"data": data, "labels": labels}, metadata)


def _reference_file(data: Path, scoring: Options) -> Path:
    """ADM's reference batch: --reference, else the VIRTUAL_imagenet*.npz in the data folder."""
    if scoring.reference:
        return existing(scoring.reference)
    return find_file(
        data, RELEASES["imagenet_generation"].original, "ADM's reference batch (or pass it as --reference)"
    )


def judge(
    task: Task, records: dict[int, Record], out: Path, scoring: Options, device: str, quiet: bool
) -> None:
    """Write samples.npz for ADM's evaluator; compute Inception features of samples and reference."""
    generated = images_of_run(task, records, out)
    # ADM's evaluator needs TensorFlow 1, so users run it elsewhere on this file
    if distributed.is_main() and generated.names:
        write_adm_samples(generated, out / "submission" / "samples.npz")
    if not scoring.inception_weights or not generated.names:
        return
    # the reference batch has statistics of all images, and 10,000 images for precision and recall
    reference = inception_features.reference_images(str(_reference_file(task.truth["data"], scoring)))
    sets = [generated] if reference is None else [generated, reference]
    variant = inception_features.choose_variant(scoring, "adm")
    inception_features.extract_inception_features(
        out, variant, scoring.inception_weights, sets, device, quiet
    )


def score(
    task: Task, records: dict[int, Record], folder: Path, run: dict[str, Any], scoring: Options
) -> Scored:
    """gFID, sFID and Inception Score of the generated images; precision and recall against 10,000 images."""
    require_generated_images(task, records, folder)
    variant = inception_features.choose_variant(scoring, "adm")
    # the reference statistics were computed with ADM's graph alone
    if variant != "adm":
        raise UserError(f"inception_variant is {variant!r}; imagenet_generation allows only 'adm'.")
    file = str(_reference_file(task.truth["data"], scoring))
    features = inception_features.require_inception_features(folder, variant, "samples")
    reference = inception_features.reference_moments(file, folder, variant)
    result = inception_features.feature_distances(folder, variant, features, reference, "g")
    metrics, problems = result.metrics, result.problems
    # sFID uses spatial features, which have statistics of their own
    spatial = inception_features.reference_moments(file, folder, variant, "spatial")
    sfid = fid.frechet_distance(features.moments("spatial"), spatial[0])
    metrics["sfid"] = Metric(sfid, features.n, None, "fid")
    logits = features.column("logits")
    # the score uses blocks of 5000, each of which must contain all classes: permute
    score = fid.inception_score_adm(logits[adm_order(len(logits))])
    metrics["inception_score"] = Metric(score, features.n, None, "score")
    real = inception_features.read_inception_features(folder, variant, "reference")
    if real is not None and min(real.n, features.n) > 3:  # k = 3 neighbours other than the point itself
        masks = fid.manifold_membership(real.column("pooled"), features.column("pooled"))
        for name, mask in zip(("precision", "recall"), masks):
            metrics[name] = Metric(float(mask.mean()), len(mask), bootstrap(mean_columns(mask)))
        problems += inception_features.unreadable_note(real, "reference images")
    absent = len(task.samples) - features.n
    problems += [f"{absent} images are missing from the metrics"] * (absent > 0)
    reason = "ADM's TensorFlow graph is replaced by our port of it"
    if run["model"].get("kind") == "mllm":
        reason += "; images are generated from class names as prompts, not by a class-conditional model"
    per_sample, details = unscored_records(task, records), {"fid": result.details}
    return Scored(metrics, details, per_sample, not_comparable=reason, problems=problems)


def submit(task: Task, records: dict[int, Record], folder: Path, data: Path) -> list[Path]:
    """The input of ADM's evaluator, written by the judge pass."""
    path = folder / "submission" / "samples.npz"
    return [path] if path.exists() else []
