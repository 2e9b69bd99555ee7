"""Positions (scenes): a generated image must show exactly the prompt's object in the prompt's grid cell."""

from pathlib import Path
from typing import Any

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing
from open_unitok.core.text_files import read_json, read_json_lines

from ..core.annotations import require_key, require_mostly_valid, require_text, require_type
from ..core.benchmark import Options, Record, Sample, Scored, Task
from ..judges import ceiling, detections
from ..judges.detections import Verdict
from ..judges.single_objects import judge_images, judge_single_object, only_box

# the second name: folders written before version 0.1.1
_FILES = ("positions.jsonl", "drawing_positions.jsonl")
WRONG_POSITION = "right object, wrong position"

answer = detections.generate_and_detect


def load(data: Path, settings: Options) -> Task:
    """Prompts for one object of a colour in a cell; one matching test image per prompt for the ceiling."""
    paths = [data / "test" / name for name in _FILES]
    path = existing(next((p for p in paths if p.exists()), paths[0]), "`unitok data scenes` writes it.")
    prompts = [
        _check_prompt(row, f"{path}, prompt {i}")
        for i, row in enumerate(read_json_lines(path, lenient=True)[: settings.limit], 1)
    ]
    per_prompt = settings.images_per_prompt or 1
    # scenes data sets have hundreds of prompts, so one image each is enough
    samples, owners = ceiling.generation_samples(prompts, per_prompt, settings.seed)
    require_mostly_valid(samples, path)
    scenes, problems = ceiling.ceiling_scenes(data)
    # each matched prompt is removed: one real image per prompt
    unmatched = {(row["class"], row["color"], tuple(row["cell"])): i for i, row in enumerate(prompts)}
    for file, objects in scenes:
        if len(objects) != 1:
            continue
        # a match has the shape, colour and cell of the prompt
        key = (objects[0]["shape"], objects[0]["color"], tuple(objects[0]["cell"]))
        if key in unmatched:
            owner = unmatched.pop(key)
            image = data / "test" / file
            samples.append(Sample(len(samples), file, prompts[owner]["prompt"], image, "reconstruct"))
            owners.append(owner)
    truth = {"prompts": prompts, "owners": owners, "cell": _cell_side(data / "scenes.json")}
    detector = detections.choose_detector(data, settings)
    truth["detect"] = detections.scenes_detection(data) if detector == "scenes" else None
    metadata = detections.detection_metadata(settings, detector, per_prompt)
    return Task(samples, truth, metadata | {"prompts": len(prompts)}, problems)


def _check_prompt(row: Any, where: str) -> Record:
    """A valid line of the file, or a prompt with the error under "malformed", which no image satisfies."""
    try:
        for key in ("prompt", "class", "color"):
            require_text(row, key, where)
        cell = require_type(list, require_key(row, "cell", where), f"{where}, cell")
        if len(cell) != 2 or not all(isinstance(n, int) for n in cell):
            raise UserError(f"{where}: cell is {cell!r}; it must be [row, column].")
    except UserError as error:
        return {"prompt": "", "class": "", "color": "", "cell": [], "malformed": str(error)}
    return row


def _cell_side(path: Path) -> float:
    """The side of a cell of the scenes' grid in pixels."""
    size, grid = (require_key(read_json(path), key, path) for key in ("size", "grid"))
    if not isinstance(size, int) or not isinstance(grid, int) or min(size, grid) < 1:
        raise UserError(f"{path}: size is {size!r} and grid {grid!r}; they must be positive integers.")
    return size / grid


def judge_position(prompt: Record, detected: Record, cell: float) -> Verdict:
    """Correct: exactly one object, with the prompt's shape and colour and its centre in the prompt's cell."""
    verdict = judge_single_object(prompt, detected)
    if not verdict.correct:
        return verdict
    box = only_box(detected)
    # the centre decides: jitter may move an object across the edge of its cell
    if [int((box[1] + box[3]) / 2 // cell), int((box[0] + box[2]) / 2 // cell)] != list(prompt["cell"]):
        return Verdict(False, WRONG_POSITION, verdict.kept)
    return verdict


def score(
    task: Task, records: dict[int, Record], folder: Path, run: dict[str, Any], scoring: Options
) -> Scored:
    """The fraction of images with exactly the prompt's object: at its position, and at any position."""
    cell = task.truth["cell"]
    per_sample, found = judge_images(task, records, folder, judge_position, "color", cell)
    for row in per_sample:
        # "object" ignores the position: it separates recognition from placement
        row["object"] = float(row["score"] == 1 or row["reason"] == WRONG_POSITION)
    generated = [r for r in per_sample if r["kind"] == "generate" and not r["held_out"]]
    metrics = {
        "position": ceiling.prompt_mean(generated),
        "object": ceiling.prompt_mean([r | {"score": r["object"]} for r in generated]),
    }
    ceiling.add_held_out_and_ceiling(metrics, per_sample)
    details = {"ceiling_overall": metrics["ceiling"].value if "ceiling" in metrics else None}
    reason = detections.not_comparable_reason(task, found)
    return Scored(metrics, details, per_sample, not_comparable=reason, problems=found.problems)
