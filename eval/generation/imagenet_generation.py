"""Class-conditional ImageNet as ADM measures it: gFID, sFID, Inception Score, precision and recall."""

from pathlib import Path
from typing import Any

import numpy as np

from open_unitok.core import distributed
from open_unitok.core.errors import UserError
from open_unitok.core.files import existing

from ..core import imagenet
from ..core.bootstrap import bootstrap, mean_columns
from ..core.generated_images import generation_metadata, per_drawing, require_generated_images
from ..core.harness import Metric, Record, Sample, Scored, Scoring, Settings, Task
from ..metrics import fid, inception_features
from ..metrics.adm_samples import adm_order, write_adm_samples

SAMPLES = 50_000  # class-conditional drawings


def load_classes(data: Path, settings: Settings) -> Task:
    """50,000 drawings of classes at random, as LlamaGen samples them; the prompt names the class."""
    count = settings.limit or SAMPLES
    labels = np.random.default_rng(settings.seed).integers(0, 1000, count).tolist()
    names = imagenet.names()
    samples = [
        Sample(i, f"{i:06d}", f"a photo of a {names[c]}.", None, "generate", settings.seed + i)
        for i, c in enumerate(labels)
    ]
    about = generation_metadata(settings, "png") | {
        "labels": "uniform at random",
        "split": "ImageNet 256, training set",
    }
    return Task(samples, {"data": data, "labels": labels}, about)


def reference_of(data: Path, scoring: Scoring) -> Path:
    """The reference batch: --reference, or the one VIRTUAL_imagenet*.npz in the data folder."""
    if scoring.reference:
        return existing(scoring.reference)
    found = sorted(data.glob("VIRTUAL_imagenet*.npz"))
    if len(found) != 1:
        raise UserError(
            f"{data}: expected one VIRTUAL_imagenet*_labeled.npz (ADM's reference batch), found "
            f"{len(found)}; name it with --reference."
        )
    return found[0]


def look_classes(
    task: Task, rows: dict[int, Record], out: Path, scoring: Scoring, device: str, quiet: bool
) -> None:
    """ADM's file of the drawings; Inception features of them and of the reference's 10,000 images."""
    drawn = inception_features.of_run(task, rows, out)
    if distributed.is_main() and drawn.names:
        write_adm_samples(drawn, out / "submission" / "samples.npz")
    if not scoring.inception_weights or not drawn.names:
        return
    reference = inception_features.reference_set(str(reference_of(task.truth["data"], scoring)))
    sets = [drawn] if reference is None else [drawn, reference]
    inception_features.extract(
        out, inception_features.lineage_of(scoring, "adm"), scoring.inception_weights, sets, device, quiet
    )


def score_classes(
    task: Task, rows: dict[int, Record], folder: Path, run: dict[str, Any], scoring: Scoring
) -> Scored:
    """gFID, sFID and Inception Score of 50,000 drawings; precision and recall against 10,000 real ones."""
    require_generated_images(task, rows, folder)
    lineage = inception_features.lineage_of(scoring, "adm")
    if lineage != "adm":
        raise UserError(f"lineage is {lineage!r}; class-conditional ImageNet is measured with 'adm'.")
    reference = str(reference_of(task.truth["data"], scoring))
    drawn = inception_features.needed(folder, lineage, "samples")
    moments = inception_features.reference_moments(reference, folder, lineage)
    result = inception_features.distances(folder, lineage, drawn, moments, "g")
    metrics, problems = result.metrics, result.problems
    spatial = inception_features.reference_moments(reference, folder, lineage, "spatial")
    metrics["sfid"] = Metric(fid.frechet_distance(drawn.moments("spatial"), spatial[0]), drawn.n, None, "fid")
    logits = drawn.column("logits")
    metrics["inception_score"] = Metric(
        fid.inception_score_adm(logits[adm_order(len(logits))]), drawn.n, None, "score"
    )
    real = inception_features.read(folder, lineage, "reference")
    if real is not None and min(real.n, drawn.n) > 3:
        both = fid.manifold_membership(real.column("pooled"), drawn.column("pooled"))
        for name, flags in zip(("precision", "recall"), both):
            metrics[name] = Metric(float(flags.mean()), len(flags), bootstrap(mean_columns(flags)))
        problems += inception_features.unread(real, "reference images")
    absent = len(task.samples) - drawn.n
    problems += [f"{absent} drawings are missing from the numbers"] * (absent > 0)
    why = "ADM's TensorFlow graph is replaced by our port of it"
    if run["model"].get("kind") != "images drawn elsewhere":
        why += "; drawn from class names as prompts, not by a class-conditional model"
    return Scored(
        metrics, {"fid": result.details}, per_drawing(task, rows), not_comparable=why, problems=problems
    )


def submit_classes(task: Task, rows: dict[int, Record], folder: Path, data: Path) -> list[Path]:
    """The input of ADM's evaluator, which lies there since the drawings were looked at."""
    path = folder / "submission" / "samples.npz"
    return [path] if path.exists() else []
