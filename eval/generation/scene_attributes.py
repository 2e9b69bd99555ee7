"""Attributes (scenes): a generated image must show exactly the prompt's object, in its size or texture."""

from pathlib import Path
from typing import Any

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing
from open_unitok.core.text_files import read_json, read_json_lines

from ..core.annotations import require_key, require_mostly_valid, require_text
from ..core.benchmark import Options, Record, Sample, Scored, Task
from ..judges import ceiling, detections
from ..judges.detections import Verdict
from ..judges.single_objects import judge_images, judge_single_object, only_box

ATTRIBUTES = ("size", "texture")

answer = detections.generate_and_detect


def load(data: Path, settings: Options) -> Task:
    """Prompts for one object of a size or texture; one matching test image per prompt for the ceiling."""
    path = existing(
        data / "test" / "attributes.jsonl",
        "`unitok data scenes` writes it, also to a finished folder, if sizes or textures have names.",
    )
    prompts = [
        _check_prompt(row, f"{path}, prompt {i}")
        for i, row in enumerate(read_json_lines(path, lenient=True)[: settings.limit], 1)
    ]
    per_prompt = settings.images_per_prompt or 1
    samples, owners = ceiling.generation_samples(prompts, per_prompt, settings.seed)
    require_mostly_valid(samples, path)
    scenes, problems = ceiling.ceiling_scenes(data)
    singles = [(file, objects[0]) for file, objects in scenes if len(objects) == 1]
    for owner, prompt in enumerate(prompts):
        match = next((file for file, found in singles if _shows(prompt, found)), None)
        if match:
            image = data / "test" / match
            samples.append(Sample(len(samples), match, prompt["prompt"], image, "reconstruct"))
            owners.append(owner)
    truth = {"prompts": prompts, "owners": owners, "sizes": _size_names(data / "scenes.json")}
    # other detectors report no textures
    truth["detect"] = detections.scenes_detection(data)
    metadata = detections.detection_metadata(settings, "scenes", per_prompt)
    return Task(samples, truth, metadata | {"prompts": len(prompts)}, problems)


def _check_prompt(row: Any, where: str) -> Record:
    """A valid line of the file, or a prompt with the error under "malformed", which no image satisfies."""
    try:
        for key in ("prompt", "class", "color"):
            require_text(row, key, where)
        if require_key(row, "tag", where) not in ATTRIBUTES:
            raise UserError(f"{where}: tag is {row['tag']!r}; allowed: {', '.join(ATTRIBUTES)}.")
        require_text(row, row["tag"], where)
    except UserError as error:
        return {"tag": ATTRIBUTES[0], "prompt": "", "class": "", "color": "", "malformed": str(error)}
    return row


def _shows(prompt: Record, scene_object: Record) -> bool:
    """Whether a real object is the prompt's."""
    wanted = [prompt["class"], prompt["color"], prompt.get("size"), prompt.get("texture")]
    found = [scene_object[key] for key in ("shape", "color", "size_name", "texture")]
    return all(word in (None, other) for word, other in zip(wanted, found))


def _size_names(path: Path) -> dict[str, float]:
    """Name -> side of the bounding box in pixels."""
    names, sides = (require_key(read_json(path), key, path) for key in ("size_names", "sizes"))
    if len(names) not in (0, len(sides)):
        raise UserError(f"{path}: {len(names)} size_names for {len(sides)} sizes; expected one each or none.")
    return dict(zip(names, sides))


def judge_attributes(prompt: Record, detected: Record, sizes: dict[str, float]) -> Verdict:
    """Correct: exactly one object, with the prompt's shape, colour, and size or texture.

    The size is the one of `sizes` that is nearest to the side of the detected box.
    """
    verdict = judge_single_object(prompt, detected)
    if not verdict.correct:
        return verdict
    if prompt["tag"] == "texture" and "textures" not in detected:
        raise UserError(f"scene_attributes: the detections for {prompt['prompt']!r} have no textures.")
    box = only_box(detected)
    side = box[2] - box[0]
    found = {
        "size": min(sizes, key=lambda word: abs(sizes[word] - side), default=""),
        "texture": (detected.get("textures", {}).get(prompt["class"]) or [""])[0],
    }[prompt["tag"]]
    if found != prompt[prompt["tag"]]:
        return Verdict(False, f"right object, but {found}", verdict.kept)
    return verdict


def score(
    task: Task, records: dict[int, Record], folder: Path, run: dict[str, Any], scoring: Options
) -> Scored:
    """The fraction of images with exactly the prompt's object and attribute, over all and per tag."""
    sizes = task.truth["sizes"]
    per_sample, found = judge_images(task, records, folder, judge_attributes, "tag", sizes)
    generated = [r for r in per_sample if r["kind"] == "generate" and not r["held_out"]]
    metrics = {"accuracy": ceiling.prompt_mean(generated)}
    for tag in ATTRIBUTES:
        own = [r for r in generated if r["group"] == tag]
        if own:
            metrics[f"tag/{tag}"] = ceiling.prompt_mean(own)
    ceiling.add_held_out_and_ceiling(metrics, per_sample)
    details = {"ceiling_overall": metrics["ceiling"].value if "ceiling" in metrics else None}
    reason = detections.not_comparable_reason(task, found)
    return Scored(metrics, details, per_sample, not_comparable=reason, problems=found.problems)
