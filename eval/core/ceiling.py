"""Images generated from prompts beside reconstructions of real ones, whose score is the ceiling."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from open_unitok.core.errors import UserError

from .bootstrap import bootstrap, mean_columns
from .generated_images import generate_images
from .harness import Metric, Record, Sample, Settings, Task, Work, malformed_sample
from .image_files import open_images, save_image
from .scenes import Scene, read_scenes


def to_draw(prompts: Sequence[Record], each: int, seed: int) -> tuple[list[Sample], list[int]]:
    """`each` drawings per prompt, named as GenEval lays them, with seeds; and of each its prompt's number."""
    numbered = [(i, j, row["prompt"]) for i, row in enumerate(prompts) for j in range(each)]
    samples = [
        malformed_sample(n, f"{i:05d}/samples/{j:04d}", prompts[i]["broken"])
        if "broken" in prompts[i]
        else Sample(n, f"{i:05d}/samples/{j:04d}", prompt, None, "generate", seed + n)
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


def scenes_to_copy(data: Path) -> tuple[list[Scene], list[str]]:
    """The scenes of `test/captions.json`, and a line about the entries that describe none."""
    found = read_scenes(data / "test" / "captions.json")
    bad = [scene for scene in found if isinstance(scene, UserError)]
    good = [scene for scene in found if not isinstance(scene, UserError)]
    told = f"{len(bad)} images have no part in the ceiling, their entries are malformed, the first: "
    return good, [told + str(bad[0])] if bad else []


def worker(detect: Callable[[Sequence[np.ndarray]], list[Record]] | None) -> Work:
    """The function that draws or copies a batch, saves the images and notes what the detector finds."""

    def work(model: Any, batch: list[Sample], out: Path, task: Task) -> list[Record]:
        rows: list[Record] = [{} for _ in batch]
        pictures: dict[int, np.ndarray] = {}
        drawn = [i for i, s in enumerate(batch) if s.kind == "generate"]
        copied = [i for i, s in enumerate(batch) if s.kind == "reconstruct"]
        if drawn:
            for i, result in zip(drawn, generate_images(model, [batch[i] for i in drawn])):
                if isinstance(result, str):
                    rows[i] = {"error": result}
                else:
                    pictures[i] = result
        if copied:
            errors, images = open_images([batch[i] for i in copied])
            for place, i in enumerate(copied):
                rows[i] = errors[place]
            copies = model.reconstruct(list(images.values())).decoded if images else []
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
    if sample.kind == "reconstruct":
        file = f"copies/{sample.index:06d}.png"
    else:
        file = f"images/{sample.id}.png"
        metadata = (out / file).parent.parent / "metadata.jsonl"
        if not metadata.exists():
            metadata.parent.mkdir(parents=True, exist_ok=True)
            metadata.write_text(json.dumps(task.truth["prompts"][task.truth["owners"][sample.index]]) + "\n")
    save_image(image, out / file)
    return file


def describe(sample: Sample, rows: dict[int, Record], good: bool, reason: str, held_out: bool) -> Record:
    """A line of the per-sample scores."""
    row = rows.get(sample.index, {})
    return {
        "index": sample.index, "kind": "generate" if sample.malformed else sample.kind,
        "prompt": sample.prompt,
        "file": row.get("file"), "score": float(good), "reason": reason or row.get("unclear", ""),
        "held_out": bool(held_out), **({"error": row["error"]} if row.get("error") else {}),
    }  # fmt: skip


def share(rows: Sequence[Record]) -> Metric:
    """The mean score of some rows, resampled by prompt."""
    scores = [r["score"] for r in rows]
    return Metric(
        float(np.mean(scores)), len(rows), bootstrap(mean_columns(scores), [r["owner"] for r in rows])
    )


def add_apart(metrics: dict[str, Metric], per_sample: Sequence[Record]) -> None:
    """Add what is scored apart: drawings of held-out pairs, and copies of real images (the ceiling)."""
    apart = [r for r in per_sample if r["kind"] == "generate" and r["held_out"]]
    copies = [r for r in per_sample if r["kind"] == "reconstruct" and not r["held_out"]]
    if apart:
        metrics["held-out pairs"] = share(apart)
    if copies:
        metrics["ceiling"] = share(copies)
