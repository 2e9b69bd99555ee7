"""Single objects at named places (scenes): does a drawing show exactly the object, where it was asked for."""

from pathlib import Path
from typing import Any

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing, read_json, read_jsonl_lenient

from ..core import ceiling
from ..core.annotations import require_key, require_mostly_valid, require_text, require_type
from ..core.harness import Record, Sample, Scored, Scoring, Settings, Task
from ..judges import detections
from ..judges.detections import Verdict


def load_positions(data: Path, settings: Settings) -> Task:
    """`test/positions.jsonl`: one object, its colour, its place; the ceiling on real images."""
    names = ("positions.jsonl", "drawing_positions.jsonl")  # the second is the name until version 0.1.0
    paths = [data / "test" / name for name in names]
    path = existing(paths[paths[1].exists() and not paths[0].exists()], "`unitok data scenes` writes it.")
    prompts = [
        position_of(row, f"{path}, prompt {i}")
        for i, row in enumerate(read_jsonl_lenient(path)[: settings.limit], 1)
    ]
    each = settings.images_per_prompt or 1
    samples, owners = ceiling.to_draw(prompts, each, settings.seed)
    require_mostly_valid(samples, path)
    scenes, problems = ceiling.scenes_to_copy(data)
    places = {(row["class"], row["color"], tuple(row["cell"])): i for i, row in enumerate(prompts)}
    for file, things in scenes:
        key = (things[0]["shape"], things[0]["color"], tuple(things[0]["cell"])) if len(things) == 1 else None
        if key in places:
            owner = places.pop(key)
            image = data / "test" / file
            samples.append(Sample(len(samples), file, prompts[owner]["prompt"], image, "reconstruct"))
            owners.append(owner)
    truth = {"prompts": prompts, "owners": owners, "cell": cell_of(data / "scenes.json")}
    about = ceiling.about_drawing(settings, detections.detector_for(data, settings), each)
    return Task(samples, truth, about | {"prompts": len(prompts)}, problems)


def position_of(row: Any, where: str) -> Record:
    """A prompt with what it asks for; one that is malformed is "broken" with the reason, and fits nothing."""
    try:
        for key in ("prompt", "class", "color"):
            require_text(row, key, where)
        cell = require_type(list, require_key(row, "cell", where), f"{where}, cell")
        if len(cell) != 2 or not all(isinstance(n, int) for n in cell):
            raise UserError(f"{where}: cell is {cell!r}; it must be [row, column].")
    except UserError as error:
        return {"prompt": "", "class": "", "color": "", "cell": [], "broken": str(error)}
    return row


def cell_of(path: Path) -> float:
    """The side of a cell of the scenes' grid in pixels."""
    size, grid = (require_key(read_json(path), key, path) for key in ("size", "grid"))
    if not isinstance(size, int) or not isinstance(grid, int) or min(size, grid) < 1:
        raise UserError(f"{path}: size is {size!r} and grid {grid!r}; they must be whole numbers above 0.")
    return size / grid


def judge_position(prompt: Record, seen: Record, cell: float) -> Verdict:
    """Exactly one object, of the shape and colour asked for, its middle in the cell asked for."""
    boxes = [(name, box) for name, rows in seen["detections"].items() for box in rows]
    if len(boxes) != 1:
        return Verdict(False, f"expected one object, found {len(boxes)}", {})
    name, box = boxes[0]
    colour = (seen.get("colors", {}).get(name) or [""])[0]
    if (name, colour) != (prompt["class"], prompt["color"]):
        return Verdict(False, f"found a {colour} {name}", {name: 1})
    place = [int((box[1] + box[3]) / 2 // cell), int((box[0] + box[2]) / 2 // cell)]
    if place != list(prompt["cell"]):
        return Verdict(False, "right object, wrong place", {name: 1})
    return Verdict(True, "", {name: 1})


def score_positions(
    task: Task, rows: dict[int, Record], folder: Path, run: dict[str, Any], scoring: Scoring
) -> Scored:
    """The share of drawings with exactly the object asked for: at its place, and wherever it is."""
    prompts, owners = task.truth["prompts"], task.truth["owners"]
    found = detections.findings(task, rows, folder)
    per_sample = []
    for sample in task.samples:
        prompt = prompts[owners[sample.index]]
        seen = None if sample.malformed else found.by_index.get(sample.index)
        verdict = detections.judged(judge_position, prompt, seen, task.truth["cell"])
        row = ceiling.describe(sample, rows, verdict.correct, verdict.reason, prompt.get("held_out", False))
        whole = verdict.correct or verdict.reason == "right object, wrong place"
        per_sample.append(
            row | {"owner": owners[sample.index], "group": prompt["color"], "object": float(whole)}
        )
    drawn = [r for r in per_sample if r["kind"] == "generate" and not r["held_out"]]
    metrics = {
        "position": ceiling.share(drawn),
        "object": ceiling.share([r | {"score": r["object"]} for r in drawn]),
    }
    ceiling.add_apart(metrics, per_sample)
    upper = metrics["ceiling"].value if "ceiling" in metrics else None
    why = detections.why_not(task, found)
    return Scored(
        metrics, {"ceiling_overall": upper}, per_sample, not_comparable=why, problems=found.problems
    )
