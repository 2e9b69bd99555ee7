"""Object detections for GenEval and positions.

Sources, in order of precedence: `detections.jsonl` in the run folder (any detector), a judge pass with models
of transformers, or the scenes detector, which runs during generation. A line of `detections.jsonl`:
`{"index": i, "detections": {class: [[x0, y0, x1, y1, score], ...]}, "colors": {class: [colour, ...]}}`, and
"detector", its name.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing

from ..core.annotations import require_key, require_type
from ..core.benchmark import Options, Record, Sample, Task
from ..core.generated_images import describe_sampling
from ..core.judge_pass import (
    ExternalFindings,
    judge_findings,
    read_external_findings,
    read_judge_pass,
    run_judge_pass,
    samples_with_images,
)
from ..core.results import model_fingerprint
from .ceiling import generate_and_reconstruct
from .object_detector import ColourClassifier, detections_record, load_detector
from .scenes_detector import ScenesDetector

DETECTORS = ("scenes", "none")
PUBLISHED_DETECTOR = "mmdet Mask2Former"  # "detector" in detections.jsonl of a comparable run
_BATCH = 8  # images per batch of a judge pass


class Verdict(NamedTuple):
    """The result of one image; `reason` is "" if it is correct, `kept` counts the used boxes per class."""

    correct: bool
    reason: str
    kept: dict[str, int]


def choose_detector(data: Path, settings: Options) -> str:
    """The `detector` option; by default "scenes" if the data has a `scenes.json`, else "none"."""
    name = settings.detector or ("scenes" if (data / "scenes.json").exists() else "none")
    if name not in DETECTORS:
        raise UserError(f"detector is {name!r}; allowed: {', '.join(DETECTORS)}.")
    # fail before the model is loaded
    if name == "scenes":
        existing(data / "scenes.json", "The scenes detector reads the palette and the shapes from it.")
    return name


def detection_metadata(settings: Options, detector: str, per_prompt: int) -> dict[str, Any]:
    """The part of a result that describes generation and detection."""
    return {
        "detector": detector,
        "images per prompt": per_prompt,
        "decoding": describe_sampling(settings),
        "images": "PNG",
    }


def true_detections(objects: Sequence[Record]) -> Record:
    """The output of a perfect detector on a scene, in the format of a record."""
    truth: Record = {"detections": {}, "colors": {}}
    for item in objects:
        truth["detections"].setdefault(item["shape"], []).append([*item["box"], 1.0])  # score 1
        truth["colors"].setdefault(item["shape"], []).append(item["color"])
    return truth


def generate_and_detect(model: Any, batch: list[Sample], out: Path, task: Task) -> list[Record]:
    """Generate or reconstruct a batch, save the images, and record detections by `task.truth["detect"]`."""
    records, images = generate_and_reconstruct(model, batch, out, task)
    detect = task.truth["detect"]
    # None: a judge pass or detections.jsonl supplies the detections later
    if detect and images:
        for i, found in zip(images, detect(list(images.values()))):
            records[i] |= found
    return records


def scenes_detection(data: Path) -> Callable[[Sequence[np.ndarray]], list[Record]]:
    """The scenes detector as a function: images -> records."""
    detector = ScenesDetector.from_file(data / "scenes.json")
    shape = (detector.size, detector.size, 3)

    def detect(images: Sequence[np.ndarray]) -> list[Record]:
        # an image of another size, e.g. of another system, must not fail the whole batch
        found = iter(detector([image for image in images if image.shape == shape]))
        records = []
        for image in images:
            if image.shape != shape:
                records.append({"error": f"the image is {image.shape}; these scenes are {shape}"})
                continue
            detection = next(found)
            boxes, colours = detection.geneval()
            boxes = {c: [[round(float(v), 4) for v in box] for box in rows] for c, rows in boxes.items()}
            found_here = {"detections": boxes, "colors": colours, "textures": detection.textures()}
            records.append(found_here | {"unclear": detection.reason})
        return records

    return detect


def run_detection_pass(
    task: Task, records: dict[int, Record], out: Path, scoring: Options, device: str, quiet: bool
) -> None:
    """Judge pass: detect the objects of all generated images with --detector-model and --colour-model."""
    if not scoring.detector_model:
        return
    if not scoring.colour_model:
        raise UserError("--detector-model needs --colour-model, a CLIP folder that names colours of objects.")
    detect = load_detector(scoring.detector_model, device)
    classify_colours = ColourClassifier(scoring.colour_model, device)
    clauses = [c for row in task.truth["prompts"] for c in (*row["include"], *row.get("exclude", ()))]
    names = sorted({clause["class"] for clause in clauses})

    def detect_batch(batch: list[Sample], images: list[Any]) -> list[Record]:
        # classes that occur in no prompt cannot affect a verdict
        kept = [[d for d in found if d.name in names] for found in detect(images, names)]
        return [detections_record(found, classify_colours(i, found)) for i, found in zip(images, kept)]

    # another detector or another CLIP is another judge
    both = [model_fingerprint(Path(p)) for p in (scoring.detector_model, scoring.colour_model)]
    about = {
        "model": f"{Path(scoring.detector_model).name} and {Path(scoring.colour_model).name}",
        "fingerprint": hashlib.sha256("".join(both).encode()).hexdigest(),
    }
    generated = [s for s in samples_with_images(task.samples, records) if s.kind == "generate"]
    run_judge_pass(out, "detections", about, generated, records, detect_batch, _BATCH, quiet)


def read_detections(task: Task, records: dict[int, Record], folder: Path) -> ExternalFindings:
    """The detections of a run, from the first source that exists (see the module's docstring).

    Raises:
        UserError: there are images but no detections.
    """
    path = folder / "detections.jsonl"
    if path.exists():
        return read_external_findings(
            path, task.samples, check_detections, "detector", "a detector without a name"
        )
    if judged := read_judge_pass(folder, "detections", samples_with_images(task.samples, records)):
        found, problems = judge_findings(judged[0])
        return ExternalFindings(found, f"{judged[1]['model']} of transformers", problems)
    # recorded while the images were generated
    found = {i: record for i, record in records.items() if "detections" in record}
    if not found and any(record.get("file") for record in records.values()):
        raise UserError(
            f"{folder}: the images are generated, but have no detections. Run again with --detector-model "
            "and --colour-model (the images are kept), or run a detector of your own on "
            f"{folder / 'images'} and write its detections to {path}."
        )
    return ExternalFindings(found, "scenes" if task.metadata["detector"] == "scenes" else "nothing", [])


def verdict_on(judge: Callable[..., Verdict], prompt: Record, detected: Record | None, *more: Any) -> Verdict:
    """The verdict of `judge`; an image without detections is wrong."""
    return judge(prompt, detected, *more) if detected is not None else Verdict(False, "no image", {})


def not_comparable_reason(task: Task, found: ExternalFindings) -> str:
    """The reason why the numbers are not comparable with published ones, else ""."""
    if task.metadata["detector"] == "scenes":
        return "the prompts and the detector are those of scenes"
    same = found.by == PUBLISHED_DETECTOR
    reasons = [] if same else [f"objects detected by {found.by}, not by {PUBLISHED_DETECTOR}"]
    missing = sum(s.kind == "generate" and s.index not in found.by_index for s in task.samples)
    # no detections at all: the verdicts themselves come from another program
    reasons += [f"{missing} images have no detections"] * (missing > 0 and bool(found.by_index))
    return "; ".join(reasons)


def check_detections(record: Any, where: str) -> Record:
    """Validate a line of `detections.jsonl`; UserError if its boxes or colours are malformed."""
    colours = require_type(dict, record.get("colors", {}), f"{where}, colors")
    boxes_by_class = require_type(dict, require_key(record, "detections", where), f"{where}, detections")
    for name, boxes in boxes_by_class.items():
        try:
            # numpy raises on ragged and non-numeric lists; a row is x0, y0, x1, y1, score
            count = len(np.asarray(boxes, dtype=np.float32).reshape(-1, 5))
        except (ValueError, TypeError) as error:
            raise UserError(f"{where}: boxes of {name!r} must be [x0, y0, x1, y1, score]: {error}") from error
        named = require_type(list, colours.get(name) or [""] * count, f"{where}, colors of {name!r}")
        if len(named) != count:
            raise UserError(f"{where}: detections of {name!r}: {count} boxes, but {len(named)} colours.")
    return record
