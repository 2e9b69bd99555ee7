"""Classes (scenes): a generated image must show exactly one object, of the class's colour and shape."""

from pathlib import Path
from typing import Any

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing
from open_unitok.core.text_files import read_json_lines

from ..core.annotations import require_key, require_text, require_type
from ..core.benchmark import Options, Record, Sample, Scored, Task
from ..judges import ceiling, detections
from ..judges.single_objects import judge_images, judge_single_object

_IMAGES = 20  # per class

answer = detections.generate_and_detect


def load(data: Path, settings: Options) -> Task:
    """`images_per_prompt` images of every class, and every single object of the test split for the ceiling.

    A sample has the integer class, and for models that read text the object's name as a prompt.
    """
    path = existing(data / "test" / "classes.jsonl", "`unitok data scenes --classes` writes it.")
    classes = [_check_class(row, i, f"{path}, class {i}") for i, row in enumerate(read_json_lines(path))]
    samples, owners = ceiling.generation_samples(
        classes, settings.images_per_prompt or _IMAGES, settings.seed
    )
    samples = [s._replace(label=owner) for s, owner in zip(samples, owners)][: settings.limit]
    owners = owners[: len(samples)]
    scenes, problems = ceiling.ceiling_scenes(data)
    known = {(row["color"], row["class"]): i for i, row in enumerate(classes)}
    for file, objects in scenes:
        owner = known.get((objects[0]["color"], objects[0]["shape"])) if len(objects) == 1 else None
        if owner is not None and settings.limit is None:
            prompt, image = classes[owner]["prompt"], data / "test" / file
            samples.append(Sample(len(samples), file, prompt, image, "reconstruct"))
            owners.append(owner)
    detector = detections.choose_detector(data, settings)
    truth = {"prompts": classes, "owners": owners}
    truth["detect"] = detections.scenes_detection(data) if detector == "scenes" else None
    metadata = detections.detection_metadata(settings, detector, settings.images_per_prompt or _IMAGES)
    return Task(samples, truth, metadata | {"classes": len(classes)}, problems)


def _check_class(row: Any, number: int, where: str) -> Record:
    for key in ("prompt", "class", "color"):
        require_text(row, key, where)
    if require_type(int, require_key(row, "label", where), f"{where}, label") != number:
        raise UserError(f"{where}: label is {row['label']}; the classes must be in order, from 0.")
    return row


def score(
    task: Task, records: dict[int, Record], folder: Path, run: dict[str, Any], scoring: Options
) -> Scored:
    """The fraction of images that show exactly the object of their class; the same of reconstructions."""
    per_sample, found = judge_images(task, records, folder, judge_single_object, "color")
    metrics = {"accuracy": ceiling.prompt_mean([r for r in per_sample if r["kind"] == "generate"])}
    ceiling.add_held_out_and_ceiling(metrics, per_sample)
    details = {"ceiling_overall": metrics["ceiling"].value if "ceiling" in metrics else None}
    reason = detections.not_comparable_reason(task, found)
    return Scored(metrics, details, per_sample, not_comparable=reason, problems=found.problems)
