"""MJHQ-30K: FID of generated images against the released ones, overall and by category."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing

from ..core.annotations import read_json_as, require_mostly_valid, require_text
from ..core.generated_images import generation_metadata, per_drawing, require_generated_images
from ..core.harness import Metric, Record, Sample, Scored, Scoring, Settings, Task, malformed_sample
from ..core.judge_pass import samples_with_images
from ..metrics import fid, inception_features


def load_mjhq(data: Path, settings: Settings) -> Task:
    """`meta_data.json`: {id: {category, prompt}}, a drawing each at category/id."""
    path = existing(data / "meta_data.json", "MJHQ-30K is this file and its images.")
    rows = list(read_json_as(dict, path).items())[: settings.limit]
    samples = []
    for k, (name, row) in enumerate(rows):
        where = f"{path}, {name}"
        try:
            place = f"{require_text(row, 'category', where)}/{name}"
            samples.append(
                Sample(k, place, require_text(row, "prompt", where), None, "generate", settings.seed + k)
            )
        except UserError as error:
            samples.append(malformed_sample(k, name, error))
    about = generation_metadata(settings, "jpg") | {"split": f"{len(rows)} prompts"}
    return Task(require_mostly_valid(samples, path), {"data": data}, about)


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


def look_mjhq(
    task: Task, rows: dict[int, Record], out: Path, scoring: Scoring, device: str, quiet: bool
) -> None:
    """Inception features of drawings and real images."""
    drawn = inception_features.of_run(task, rows, out)
    if not scoring.inception_weights or not drawn.names:
        return
    sets = [drawn]
    if not scoring.reference.endswith(".npz"):
        sets.append(real_mjhq(task.truth["data"], scoring.reference, drawn.load(0).shape[0]))
    inception_features.extract(
        out, inception_features.lineage_of(scoring, "clean"), scoring.inception_weights, sets, device, quiet
    )


def score_mjhq(
    task: Task, rows: dict[int, Record], folder: Path, run: dict[str, Any], scoring: Scoring
) -> Scored:
    """FID against all real images, and per category where the real ones are images."""
    require_generated_images(task, rows, folder)
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
    incomplete = len(samples_with_images(task.samples, rows)) - drawn.n - len(drawn.bad)
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
    task: Task, rows: dict[int, Record], drawn: inception_features.Stored, real: inception_features.Stored
) -> dict[str, Metric]:
    """FID of each category that has two images on either side."""
    samples = samples_with_images(task.samples, rows)
    mine = [str(samples[i].id).split("/")[0] for i in drawn.numbers()]
    theirs = [name.split("/")[-2] if "/" in name else "" for name in real.names()]
    a, b = drawn.column("pooled"), real.column("pooled")
    counts = (Counter(mine), Counter(theirs))
    return {
        f"fid/{name}": Metric(
            fid.frechet_distance(
                fid.compute_moments([a[np.array(mine) == name]]),
                fid.compute_moments([b[np.array(theirs) == name]]),
            ),
            counts[0][name],
            None,
            "fid",
        )
        for name in sorted(counts[0])
        if min(counts[0][name], counts[1][name]) > 1
    }
