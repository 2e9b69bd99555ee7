"""The benchmarks that draw: GenEval, and single objects at named places, each with the tokenizer's ceiling.

The detector is apart from the scorer: `detector=scenes` reads the scenes of `unitok data scenes`; with
`detector=none` the images lie in GenEval's layout for any detector, whose findings come back as
`detections.jsonl` (a line {"index", "detections", "colors", "detector"} per image; see `geneval`).
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing, read_json

from ..core.annotations import entry
from ..core.bootstrap import bootstrap, by_group, mean_of_groups, with_ones
from ..core.generated_images import draw
from ..core.harness import Metric, Row, Sample, Scored, Scoring, Settings, Task, malformed
from ..core.judge_pass import Findings, look_all, looked, read_findings, said, with_images
from ..core.scenes import Scene, read_scenes
from ..tokenizer.reconstruction import open_images, save_image
from ..understanding.vqav2 import mean_by
from . import geneval_scorer

DETECTORS = ("scenes", "none")
PUBLISHED_DETECTOR = "mmdet Mask2Former"  # what detections.jsonl has to say to be comparable
COPIES_PER_PROMPT = 2  # real images that fit a prompt, reconstructed for its ceiling


def detector_for(data: Path, settings: Settings) -> str:
    """The detector asked for, else "scenes" where `data` says what its scenes are made of."""
    name = settings.detector or ("scenes" if (data / "scenes.json").exists() else "none")
    if name not in DETECTORS:
        raise UserError(f"detector is {name!r}; allowed: {', '.join(DETECTORS)}.")
    if name == "scenes":
        existing(data / "scenes.json", "The scenes detector reads the palette and the shapes from it.")
    return name


def load_geneval(data: Path, settings: Settings) -> Task:
    """Per prompt its drawings; for scenes also real images that fit the prompt, to be reconstructed."""
    prompts = geneval_scorer.load(data)[: settings.limit]
    detector = detector_for(data, settings)
    each = settings.images_per_prompt or (1 if detector == "scenes" else 4)
    samples, owners = to_draw(prompts, each, settings.seed)
    rules, problems = geneval_scorer.Settings(), []
    if detector == "scenes":
        rules = scene_rules(data)
        scenes, problems = scenes_to_copy(data)
        known = [(data / "test" / scene.file, truth_of(scene.objects)) for scene in scenes]
        for i, row in enumerate(prompts):
            for path in () if "broken" in row else fitting_images(known, row, rules, start=i):
                samples.append(Sample(len(samples), path.name, row["prompt"], path, "copy"))
                owners.append(i)
    truth = {"prompts": prompts, "owners": owners, "rules": rules}
    about = about_drawing(settings, detector, each) | {"prompts": len(prompts)}
    return Task(samples, truth, about, problems)


def to_draw(prompts: Sequence[Row], each: int, seed: int) -> tuple[list[Sample], list[int]]:
    """`each` drawings per prompt, named as GenEval lays them, with seeds; and of each its prompt's number."""
    numbered = [(i, j, row["prompt"]) for i, row in enumerate(prompts) for j in range(each)]
    samples = [
        malformed(n, f"{i:05d}/samples/{j:04d}", prompts[i]["broken"])
        if "broken" in prompts[i]
        else Sample(n, f"{i:05d}/samples/{j:04d}", prompt, None, "draw", seed + n)
        for n, (i, j, prompt) in enumerate(numbered)
    ]
    return samples, [i for i, _, _ in numbered]


def about_drawing(settings: Settings, detector: str, each: int) -> dict[str, Any]:
    """What the result says of how the images came about."""
    return {
        "detector": detector,
        "images per prompt": each,
        "decoding": settings.decoding,
        "images": "PNG",
    }


def scene_rules(data: Path) -> geneval_scorer.Settings:
    """GenEval's rules with the palette of the scenes; the detector alone decides what counts as found."""
    palette = tuple(entry(read_json(data / "scenes.json"), "palette", data / "scenes.json"))
    return geneval_scorer.Settings(threshold=0.0, counting_threshold=0.0, colours=palette)


def truth_of(objects: Sequence[Row]) -> Row:
    """What a perfect detector would find in a scene."""
    seen: Row = {"detections": {}, "colors": {}}
    for thing in objects:
        seen["detections"].setdefault(thing["shape"], []).append([*thing["box"], 1.0])
        seen["colors"].setdefault(thing["shape"], []).append(thing["color"])
    return seen


def scenes_to_copy(data: Path) -> tuple[list[Scene], list[str]]:
    """The scenes of `test/captions.json`, and a line about the entries that describe none."""
    found = read_scenes(data / "test" / "captions.json")
    bad = [scene for scene in found if isinstance(scene, UserError)]
    good = [scene for scene in found if not isinstance(scene, UserError)]
    told = f"{len(bad)} images have no part in the ceiling, their entries are malformed, the first: "
    return good, [told + str(bad[0])] if bad else []


def fitting_images(
    scenes: Sequence[tuple[Path, Row]], prompt: Row, rules: geneval_scorer.Settings, start: int
) -> list[Path]:
    """A few test images whose true scene satisfies the prompt; `start` spreads prompts over images."""
    need = {clause["class"] for clause in prompt["include"]}
    found = []
    for k in range(len(scenes)):
        path, seen = scenes[(start * 17 + k) % len(scenes)]
        if need <= seen["detections"].keys() and geneval_scorer.judge(prompt, seen, rules).correct:
            found.append(path)
            if len(found) == COPIES_PER_PROMPT:
                break
    return found


# ------------------------------------------------------------------------------------------------- inference


def worker(data: Path, settings: Settings) -> Callable[[Any, list[Sample], Path, Task], list[Row]]:
    """The function that draws or copies a batch, saves the images and notes what the detector finds."""
    detect = detector(data) if detector_for(data, settings) == "scenes" else None

    def work(model: Any, batch: list[Sample], out: Path, task: Task) -> list[Row]:
        rows: list[Row] = [{} for _ in batch]
        pictures: dict[int, np.ndarray] = {}
        drawn = [i for i, s in enumerate(batch) if s.kind == "draw"]
        copied = [i for i, s in enumerate(batch) if s.kind == "copy"]
        if drawn:
            for i, result in zip(drawn, draw(model, [batch[i] for i in drawn])):
                if isinstance(result, str):
                    rows[i] = {"error": result}
                else:
                    pictures[i] = result
        if copied:
            errors, images = open_images([batch[i] for i in copied])
            for place, i in enumerate(copied):
                rows[i] = errors[place]
            copies = model.reconstruct(list(images.values())).copies if images else []
            pictures |= {copied[place]: copy for place, copy in zip(images, copies)}
        for i, image in pictures.items():
            rows[i] = {"file": write_image(batch[i], image, out, task), "seed": batch[i].seed}
        if detect and pictures:
            for i, found in zip(pictures, detect([pictures[i] for i in pictures])):
                rows[i] |= found
        return rows

    return work


def write_image(sample: Sample, image: np.ndarray, out: Path, task: Task) -> str:
    """Save a drawing as GenEval lays them out, a copy aside; returns the path below `out`."""
    if sample.kind == "copy":
        file = f"copies/{sample.index:06d}.png"
    else:
        file = f"images/{sample.id}.png"
        metadata = (out / file).parent.parent / "metadata.jsonl"
        if not metadata.exists():
            metadata.parent.mkdir(parents=True, exist_ok=True)
            metadata.write_text(json.dumps(task.truth["prompts"][task.truth["owners"][sample.index]]) + "\n")
    save_image(image, out / file)
    return file


def detector(data: Path) -> Callable[[Sequence[np.ndarray]], list[Row]]:
    """Images -> what the scenes detector finds in each, as JSON."""
    from ..judges.scenes_detector import ScenesDetector

    read = ScenesDetector.from_file(data / "scenes.json")

    def detect(pictures: Sequence[np.ndarray]) -> list[Row]:
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
    task: Task, rows: dict[int, Row], out: Path, scoring: Scoring, device: str, quiet: bool
) -> None:
    """Find the objects of every drawing, and their colours, with the models of --detector-model."""
    if not scoring.detector_model:
        return
    from ..core.model import fingerprint
    from ..judges import object_detector

    if not scoring.colour_model:
        raise UserError(
            "--detector-model finds objects; their colours need --colour-model too, a CLIP folder."
        )
    find = object_detector.load(scoring.detector_model, device)
    colours = object_detector.Colours(scoring.colour_model, device)
    clauses = [c for row in task.truth["prompts"] for c in (*row["include"], *row.get("exclude", ()))]
    names = sorted({clause["class"] for clause in clauses})

    def work(batch: list[Sample], pictures: list[Any]) -> list[Row]:
        kept = [[t for t in things if t.name in names] for things in find(pictures, names)]
        return [object_detector.as_row(t, colours(p, t)) for p, t in zip(pictures, kept)]

    both = [fingerprint(Path(p)) for p in (scoring.detector_model, scoring.colour_model)]
    about = {
        "model": f"{Path(scoring.detector_model).name} and {Path(scoring.colour_model).name}",
        "fingerprint": hashlib.sha256("".join(both).encode()).hexdigest(),
    }
    drawn = [s for s in with_images(task.samples, rows) if s.kind == "draw"]
    look_all(out, "detections", about, drawn, rows, work, 8, quiet)


# --------------------------------------------------------------------------------------------------- scoring


def findings(task: Task, rows: dict[int, Row], folder: Path) -> Findings:
    """Detections: those of `detections.jsonl` where it is, else a model's, else those noted while drawing."""
    path = folder / "detections.jsonl"
    if path.exists():
        check = geneval_scorer.check_detections
        return read_findings(path, task.samples, check, "detector", "a detector without a name")
    if seen := looked(folder, "detections", with_images(task.samples, rows)):
        found, problems = said(seen[0])
        return Findings(found, f"{seen[1]['model']} of transformers", problems)
    found = {i: row for i, row in rows.items() if "detections" in row}
    if not found and any(not row.get("error") for row in rows.values()):
        raise UserError(
            f"{folder}: the images are drawn, but nothing has looked at them. Run again with "
            "--detector-model and --colour-model (nothing is drawn again), or run a detector of your own on "
            f"{folder / 'pictures'} and write its findings to {path}."
        )
    return Findings(found, "scenes" if task.about["detector"] == "scenes" else "nothing", [])


def score_geneval(
    task: Task, rows: dict[int, Row], folder: Path, run: dict[str, Any], scoring: Scoring
) -> Scored:
    """The share of correct images per tag and their mean; the ceiling beside, held-out pairs apart."""
    prompts, owners, rules = task.truth["prompts"], task.truth["owners"], task.truth["rules"]
    found = findings(task, rows, folder)
    per_sample = []
    for sample in task.samples:
        prompt = prompts[owners[sample.index]]
        seen = None if sample.broken else found.by_index.get(sample.index)
        verdict = judged(geneval_scorer.judge, prompt, seen, rules)
        per_sample.append(
            describe(sample, rows, verdict.correct, verdict.reason, prompt.get("held_out", False))
            | {"group": prompt["tag"], "owner": owners[sample.index]}
        )
        if prompt["tag"] == "colors" and len(prompt["include"]) == 1 and sample.kind == "draw":
            seen = found.by_index.get(sample.index, {}).get("detections", {})
            alone = sum(map(len, seen.values())) == prompt["include"][0]["count"]
            per_sample[-1]["exact"] = float(verdict.correct and alone)
    drawn = [r for r in per_sample if r["kind"] == "draw" and not r["held_out"]]
    summary = geneval_scorer.summarise(
        [prompts[r["owner"]] for r in drawn], [bool(r["score"]) for r in drawn], [r["owner"] for r in drawn]
    )
    interval = bootstrap(
        by_group([r["score"] for r in drawn], [r["group"] for r in drawn]),
        [r["owner"] for r in drawn],
        mean_of_groups,
    )
    metrics = {"overall": Metric(summary["overall"], len(drawn), interval)}
    for tag in summary["per_tag"]:
        metrics[f"tag/{tag}"] = share([r for r in drawn if r["group"] == tag])
    add_apart(metrics, per_sample)
    exact = [r | {"score": r["exact"]} for r in per_sample if "exact" in r and not r["held_out"]]
    if exact:
        metrics["single objects: colour, shape and number"] = share(exact)
    ceiling = mean_by(
        (r["group"], r["score"]) for r in per_sample if r["kind"] == "copy" and not r["held_out"]
    )
    details = {
        "ceiling": ceiling,
        "ceiling_overall": float(np.mean(list(ceiling.values()))) if ceiling else None,
        "images": summary["images"],
        "prompts": summary["prompts"],
    }
    details["detected by"] = found.by
    return Scored(metrics, details, per_sample, "group mean", why_not(task, found), found.problems)


def why_not(task: Task, found: Findings) -> str:
    """Why the numbers must not stand beside published ones, "" if they may."""
    if task.about["detector"] == "scenes":
        return "the prompts and the detector are those of scenes"
    same = found.by == PUBLISHED_DETECTOR
    return "" if same else f"objects found by {found.by}, not by {PUBLISHED_DETECTOR}"


def judged(judge: Callable, prompt: Row, seen: Row | None, *more: Any) -> Any:
    """A verdict; an image that is missing or that nothing looked at is wrong."""
    return judge(prompt, seen, *more) if seen is not None else geneval_scorer.Verdict(False, "no image", {})


def describe(sample: Sample, rows: dict[int, Row], good: bool, reason: str, held_out: bool) -> Row:
    """A line of the per-sample scores."""
    row = rows.get(sample.index, {})
    return {
        "index": sample.index, "kind": "draw" if sample.broken else sample.kind, "prompt": sample.prompt,
        "file": row.get("file"), "score": float(good), "reason": reason or row.get("unclear", ""),
        "held_out": bool(held_out), **({"error": row["error"]} if row.get("error") else {}),
    }  # fmt: skip


def share(rows: Sequence[Row]) -> Metric:
    """The mean score of some rows, resampled by prompt."""
    scores = [r["score"] for r in rows]
    return Metric(float(np.mean(scores)), len(rows), bootstrap(with_ones(scores), [r["owner"] for r in rows]))


def add_apart(metrics: dict[str, Metric], per_sample: Sequence[Row]) -> None:
    """Add what is scored apart: drawings of held-out pairs, and copies of real images (the ceiling)."""
    apart = [r for r in per_sample if r["kind"] == "draw" and r["held_out"]]
    copies = [r for r in per_sample if r["kind"] == "copy" and not r["held_out"]]
    if apart:
        metrics["held-out pairs"] = share(apart)
    if copies:
        metrics["ceiling"] = share(copies)
