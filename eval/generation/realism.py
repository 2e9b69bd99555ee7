"""Drawings against real images as a whole: MJHQ-30K, and class-conditional ImageNet as ADM measures it."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from open_unitok.core import distributed
from open_unitok.core.errors import UserError
from open_unitok.core.files import existing

from ..core import imagenet
from ..core.annotations import read_as, read_image, text_of, usable
from ..core.bootstrap import bootstrap, with_ones
from ..core.generated_images import about_drawing, require_drawings
from ..core.harness import Metric, Row, Sample, Scored, Scoring, Settings, Task, malformed
from ..core.judge_pass import with_images
from ..metrics import fid, inception_features
from ..metrics.adm_samples import shuffled, write_samples

SAMPLES = 50_000  # class-conditional drawings


def load_mjhq(data: Path, settings: Settings) -> Task:
    """`meta_data.json`: {id: {category, prompt}}, a drawing each at category/id."""
    path = existing(data / "meta_data.json", "MJHQ-30K is this file and its images.")
    rows = list(read_as(dict, path).items())[: settings.limit]
    samples = []
    for k, (name, row) in enumerate(rows):
        where = f"{path}, {name}"
        try:
            place = f"{text_of(row, 'category', where)}/{name}"
            samples.append(Sample(k, place, text_of(row, "prompt", where), None, "draw", settings.seed + k))
        except UserError as error:
            samples.append(malformed(k, name, error))
    about = about_drawing(settings, "jpg") | {"split": f"{len(rows)} prompts"}
    return Task(usable(samples, path), {"data": data}, about)


def real_mjhq(data: Path, reference: str, size: int) -> inception_features.ImageSet:
    """The released images, scaled to the drawings' size (Lanczos; the published size is 256)."""
    folder = Path(reference) if reference else data
    if not reference and (data / "mjhq30k_imgs").is_dir():
        folder = data / "mjhq30k_imgs"
    found = inception_features.of_folder("reference", folder)

    def load(i: int) -> np.ndarray:
        image = found.load(i)
        if image.shape[:2] == (size, size):
            return image
        return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS))

    return inception_features.ImageSet("reference", [f"{name} {size}" for name in found.names], load)


def samples_set(task: Task, rows: dict[int, Row], out: Path) -> inception_features.ImageSet:
    """The run's drawings."""
    drawn = with_images(task.samples, rows)
    paths = [out / rows[s.index]["file"] for s in drawn]
    names = [f"{s.id} {p.stat().st_size if p.exists() else 0}" for s, p in zip(drawn, paths)]
    return inception_features.ImageSet("samples", names, lambda i: np.asarray(read_image(paths[i])))


def look_mjhq(
    task: Task, rows: dict[int, Row], out: Path, scoring: Scoring, device: str, quiet: bool
) -> None:
    """Inception features of drawings and real images."""
    drawn = samples_set(task, rows, out)
    if not scoring.inception or not drawn.names:
        return
    sets = [drawn]
    if not scoring.reference.endswith(".npz"):
        sets.append(real_mjhq(task.truth["data"], scoring.reference, drawn.load(0).shape[0]))
    inception_features.extract(
        out, inception_features.lineage_of(scoring, "clean"), scoring.inception, sets, device, quiet
    )


def score_mjhq(
    task: Task, rows: dict[int, Row], folder: Path, run: dict[str, Any], scoring: Scoring
) -> Scored:
    """FID against all real images, and per category where the real ones are images."""
    require_drawings(task, rows, folder)
    lineage = inception_features.lineage_of(scoring, "clean")
    drawn = inception_features.needed(folder, lineage, "samples")
    real = inception_features.read(folder, lineage, "reference")
    if scoring.reference.endswith(".npz"):
        moments = inception_features.reference_moments(scoring.reference, folder, lineage)
        real = None
    else:
        found = inception_features.needed(folder, lineage, "reference")
        moments = (found.moments(), "the released images, scaled to the drawings' size")
        inception_features.save_statistics(folder / "reference.npz", moments[0], lineage)
    result = inception_features.distances(folder, lineage, drawn, moments, others=real)
    metrics, problems = result.metrics, result.problems
    incomplete = len(with_images(task.samples, rows)) - drawn.n - len(drawn.bad)
    if incomplete > 0:
        raise UserError(
            f"{folder}: {incomplete} drawings have no Inception features. {inception_features.HINT}"
        )
    if real is not None:
        problems += inception_features.unread(real, "real images")
        metrics |= by_category(task, rows, drawn, real)
    absent = len(task.samples) - drawn.n
    problems += [f"{absent} drawings are missing from the FID"] * (absent > 0)
    why = "" if lineage == "clean" else f"Inception lineage {lineage}; MJHQ-30K is published with clean-fid"
    return Scored(
        metrics, {"fid": result.details}, per_drawing(task, rows), not_comparable=why, problems=problems
    )


def by_category(
    task: Task, rows: dict[int, Row], drawn: inception_features.Stored, real: inception_features.Stored
) -> dict[str, Metric]:
    """FID of each category that has two images on either side."""
    samples = with_images(task.samples, rows)
    mine = [str(samples[i].id).split("/")[0] for i in drawn.numbers()]
    theirs = [name.split("/")[-2] if "/" in name else "" for name in real.names()]
    a, b = drawn.column("pooled"), real.column("pooled")
    counts = (Counter(mine), Counter(theirs))
    return {
        f"fid/{name}": Metric(
            fid.frechet(fid.moments([a[np.array(mine) == name]]), fid.moments([b[np.array(theirs) == name]])),
            counts[0][name],
            None,
            "fid",
        )
        for name in sorted(counts[0])
        if min(counts[0][name], counts[1][name]) > 1
    }


def per_drawing(task: Task, rows: dict[int, Row]) -> list[Row]:
    """A row per sample; these benchmarks have no score per image."""
    return [
        {"index": s.index, "id": s.id, "prompt": s.prompt, "file": rows.get(s.index, {}).get("file")}
        for s in task.samples
    ]


# ---------------------------------------------------------------------------------------- class-conditional


def load_classes(data: Path, settings: Settings) -> Task:
    """50,000 drawings of classes at random, as LlamaGen samples them; the prompt names the class."""
    count = settings.limit or SAMPLES
    labels = np.random.default_rng(settings.seed).integers(0, 1000, count).tolist()
    names = imagenet.names()
    samples = [
        Sample(i, f"{i:06d}", f"a photo of a {names[c]}.", None, "draw", settings.seed + i)
        for i, c in enumerate(labels)
    ]
    about = about_drawing(settings, "png") | {
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
    task: Task, rows: dict[int, Row], out: Path, scoring: Scoring, device: str, quiet: bool
) -> None:
    """ADM's file of the drawings; Inception features of them and of the reference's 10,000 images."""
    drawn = samples_set(task, rows, out)
    if distributed.is_main() and drawn.names:
        write_samples(drawn, out / "submission" / "samples.npz")
    if not scoring.inception or not drawn.names:
        return
    reference = inception_features.reference_set(str(reference_of(task.truth["data"], scoring)))
    sets = [drawn] if reference is None else [drawn, reference]
    inception_features.extract(
        out, inception_features.lineage_of(scoring, "adm"), scoring.inception, sets, device, quiet
    )


def score_classes(
    task: Task, rows: dict[int, Row], folder: Path, run: dict[str, Any], scoring: Scoring
) -> Scored:
    """gFID, sFID and Inception Score of 50,000 drawings; precision and recall against 10,000 real ones."""
    require_drawings(task, rows, folder)
    lineage = inception_features.lineage_of(scoring, "adm")
    if lineage != "adm":
        raise UserError(f"lineage is {lineage!r}; class-conditional ImageNet is measured with 'adm'.")
    reference = str(reference_of(task.truth["data"], scoring))
    drawn = inception_features.needed(folder, lineage, "samples")
    moments = inception_features.reference_moments(reference, folder, lineage)
    result = inception_features.distances(folder, lineage, drawn, moments, "g")
    metrics, problems = result.metrics, result.problems
    spatial = inception_features.reference_moments(reference, folder, lineage, "spatial")
    metrics["sfid"] = Metric(fid.frechet(drawn.moments("spatial"), spatial[0]), drawn.n, None, "fid")
    logits = drawn.column("logits")
    metrics["inception_score"] = Metric(
        fid.inception_score_adm(logits[shuffled(len(logits))]), drawn.n, None, "score"
    )
    real = inception_features.read(folder, lineage, "reference")
    if real is not None and min(real.n, drawn.n) > 3:
        both = fid.inside(real.column("pooled"), drawn.column("pooled"))
        for name, flags in zip(("precision", "recall"), both):
            metrics[name] = Metric(float(flags.mean()), len(flags), bootstrap(with_ones(flags)))
        problems += inception_features.unread(real, "reference images")
    absent = len(task.samples) - drawn.n
    problems += [f"{absent} drawings are missing from the numbers"] * (absent > 0)
    why = "ADM's TensorFlow graph is replaced by our port of it"
    if run["model"].get("kind") != "images drawn elsewhere":
        why += "; drawn from class names as prompts, not by a class-conditional model"
    return Scored(
        metrics, {"fid": result.details}, per_drawing(task, rows), not_comparable=why, problems=problems
    )


def submit_classes(task: Task, rows: dict[int, Row], folder: Path, data: Path) -> list[Path]:
    """The input of ADM's evaluator, which lies there since the drawings were looked at."""
    path = folder / "submission" / "samples.npz"
    return [path] if path.exists() else []
