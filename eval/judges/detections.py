"""Objects detected in a benchmark's images: by the scenes detector, a judge pass, or a file of detections."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing

from ..core import ceiling
from ..core.annotations import require_key, require_type
from ..core.harness import Record, Sample, Scoring, Settings, Task, Work
from ..core.judge_pass import (
    ExternalFindings,
    judge_findings,
    read_external_findings,
    read_judge_pass,
    run_judge_pass,
    samples_with_images,
)
from ..core.model import fingerprint
from . import object_detector
from .scenes_detector import ScenesDetector

DETECTORS = ("scenes", "none")
PUBLISHED_DETECTOR = "mmdet Mask2Former"  # what detections.jsonl has to say to be comparable


class Verdict(NamedTuple):
    """One image's result; `reason` is empty where it is correct, `kept` counts the boxes used per class."""

    correct: bool
    reason: str
    kept: dict[str, int]


def detector_for(data: Path, settings: Settings) -> str:
    """The detector asked for, else "scenes" where `data` says what its scenes are made of."""
    name = settings.detector or ("scenes" if (data / "scenes.json").exists() else "none")
    if name not in DETECTORS:
        raise UserError(f"detector is {name!r}; allowed: {', '.join(DETECTORS)}.")
    if name == "scenes":
        existing(data / "scenes.json", "The scenes detector reads the palette and the shapes from it.")
    return name


def truth_of(objects: Sequence[Record]) -> Record:
    """What a perfect detector would find in a scene."""
    seen: Record = {"detections": {}, "colors": {}}
    for thing in objects:
        seen["detections"].setdefault(thing["shape"], []).append([*thing["box"], 1.0])
        seen["colors"].setdefault(thing["shape"], []).append(thing["color"])
    return seen


def worker(data: Path, settings: Settings) -> Work:
    """Generate or reconstruct a batch, save the images and record what the scenes detector finds."""
    return ceiling.worker(detector(data) if detector_for(data, settings) == "scenes" else None)


def detector(data: Path) -> Callable[[Sequence[np.ndarray]], list[Record]]:
    """Images -> what the scenes detector finds in each, as JSON."""
    read = ScenesDetector.from_file(data / "scenes.json")

    def detect(pictures: Sequence[np.ndarray]) -> list[Record]:
        shape, result = (read.size, read.size, 3), []
        readings = iter(read([image for image in pictures if image.shape == shape]))
        for image in pictures:
            if image.shape != shape:
                result.append({"error": f"the image is {image.shape}; these scenes are {shape}"})
                continue
            reading = next(readings)
            boxes, colours = reading.geneval()
            boxes = {
                name: [[round(float(v), 4) for v in box] for box in rows] for name, rows in boxes.items()
            }
            result.append({"detections": boxes, "colors": colours, "unclear": reading.reason})
        return result

    return detect


def look_for_objects(
    task: Task, rows: dict[int, Record], out: Path, scoring: Scoring, device: str, quiet: bool
) -> None:
    """Find the objects of every drawing, and their colours, with the models of --detector-model."""
    if not scoring.detector_model:
        return

    if not scoring.colour_model:
        raise UserError(
            "--detector-model finds objects; their colours need --colour-model too, a CLIP folder."
        )
    find = object_detector.load(scoring.detector_model, device)
    colours = object_detector.Colours(scoring.colour_model, device)
    clauses = [c for row in task.truth["prompts"] for c in (*row["include"], *row.get("exclude", ()))]
    names = sorted({clause["class"] for clause in clauses})

    def work(batch: list[Sample], pictures: list[Any]) -> list[Record]:
        kept = [[t for t in things if t.name in names] for things in find(pictures, names)]
        return [object_detector.as_row(t, colours(p, t)) for p, t in zip(pictures, kept)]

    both = [fingerprint(Path(p)) for p in (scoring.detector_model, scoring.colour_model)]
    about = {
        "model": f"{Path(scoring.detector_model).name} and {Path(scoring.colour_model).name}",
        "fingerprint": hashlib.sha256("".join(both).encode()).hexdigest(),
    }
    drawn = [s for s in samples_with_images(task.samples, rows) if s.kind == "generate"]
    run_judge_pass(out, "detections", about, drawn, rows, work, 8, quiet)


def findings(task: Task, rows: dict[int, Record], folder: Path) -> ExternalFindings:
    """Detections: those of `detections.jsonl` where it is, else a model's, else those noted while drawing."""
    path = folder / "detections.jsonl"
    if path.exists():
        check = check_detections
        return read_external_findings(path, task.samples, check, "detector", "a detector without a name")
    if seen := read_judge_pass(folder, "detections", samples_with_images(task.samples, rows)):
        found, problems = judge_findings(seen[0])
        return ExternalFindings(found, f"{seen[1]['model']} of transformers", problems)
    found = {i: row for i, row in rows.items() if "detections" in row}
    if not found and any(not row.get("error") for row in rows.values()):
        raise UserError(
            f"{folder}: the images are drawn, but nothing has looked at them. Run again with "
            "--detector-model and --colour-model (nothing is drawn again), or run a detector of your own on "
            f"{folder / 'pictures'} and write its findings to {path}."
        )
    return ExternalFindings(found, "scenes" if task.metadata["detector"] == "scenes" else "nothing", [])


def judged(judge: Callable, prompt: Record, seen: Record | None, *more: Any) -> Any:
    """A verdict; an image that is missing or that nothing looked at is wrong."""
    return judge(prompt, seen, *more) if seen is not None else Verdict(False, "no image", {})


def why_not(task: Task, found: ExternalFindings) -> str:
    """Why the numbers must not stand beside published ones, "" if they may."""
    if task.metadata["detector"] == "scenes":
        return "the prompts and the detector are those of scenes"
    same = found.by == PUBLISHED_DETECTOR
    return "" if same else f"objects found by {found.by}, not by {PUBLISHED_DETECTOR}"


def check_detections(row: Any, where: str) -> Record:
    """What a detector found in an image; UserError where boxes or colours are not as they should be."""
    colours = require_type(dict, row.get("colors", {}), f"{where}, colors")
    for name, boxes in require_type(
        dict, require_key(row, "detections", where), f"{where}, detections"
    ).items():
        try:
            count = len(np.asarray(boxes, dtype=np.float32).reshape(-1, 5))
        except (ValueError, TypeError) as error:
            raise UserError(f"{where}: boxes of {name!r} must be [x0, y0, x1, y1, score]: {error}") from error
        named = require_type(list, colours.get(name) or [""] * count, f"{where}, colors of {name!r}")
        if len(named) != count:
            raise UserError(f"{where}: detections of {name!r}: {count} boxes, but {len(named)} colours.")
    return row
