"""Generated images, and the ceiling of their score: that of reconstructed real images.

A detector that misses objects in reconstructions misses them in perfect generations too, so no model on this
tokenizer can be expected to score higher.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from open_unitok.core.errors import UserError

from ..core.annotations import SceneAnnotation, read_scenes
from ..core.benchmark import Metric, Record, Sample, Task, malformed_sample
from ..core.bootstrap import bootstrap, mean_columns
from ..core.generated_images import ExternalImages, generate_images
from ..core.image_files import open_images, save_image


def generation_samples(
    prompts: Sequence[Record], per_prompt: int, seed: int
) -> tuple[list[Sample], list[int]]:
    """`per_prompt` samples per prompt, with ids in GenEval's layout, and the prompt index of each sample."""
    # seed + n: every image has its own noise, independent of batch and rank
    numbered = [(i, j, row["prompt"]) for i, row in enumerate(prompts) for j in range(per_prompt)]
    samples = [
        malformed_sample(n, f"{i:05d}/samples/{j:04d}", prompts[i]["malformed"])
        if "malformed" in prompts[i]
        else Sample(n, f"{i:05d}/samples/{j:04d}", prompt, None, "generate", seed + n)
        for n, (i, j, prompt) in enumerate(numbered)
    ]
    return samples, [i for i, _, _ in numbered]


def ceiling_scenes(data: Path) -> tuple[list[SceneAnnotation], list[str]]:
    """The valid scenes of `test/captions.json`, and a warning about malformed entries."""
    found = read_scenes(data / "test" / "captions.json")
    bad = [scene for scene in found if isinstance(scene, UserError)]
    good = [scene for scene in found if not isinstance(scene, UserError)]
    line = f"{len(bad)} images are left out of the ceiling: their entries are malformed, the first: "
    return good, [line + str(bad[0])] if bad else []


def generate_and_reconstruct(
    model: Any, batch: list[Sample], out: Path, task: Task
) -> tuple[list[Record], dict[int, np.ndarray]]:
    """Generate or reconstruct a batch and save it; returns records, and images by batch position."""
    records: list[Record] = [{} for _ in batch]
    images: dict[int, np.ndarray] = {}
    generated = [i for i, s in enumerate(batch) if s.kind == "generate"]
    reconstructed = [i for i, s in enumerate(batch) if s.kind == "reconstruct"]
    if isinstance(model, ExternalImages):
        for i in reconstructed:
            records[i] = {"error": "images of another system have no reconstructions, so no ceiling"}
        reconstructed = []
    if generated:
        for i, result in zip(generated, generate_images(model, [batch[i] for i in generated])):
            if isinstance(result, str):
                records[i] = {"error": result}
            else:
                images[i] = result
    if reconstructed:
        errors, originals = open_images([batch[i] for i in reconstructed])
        for k, i in enumerate(reconstructed):
            records[i] = errors[k]
        # `originals` is keyed by position within `reconstructed`
        decoded = model.reconstruct(list(originals.values())).decoded if originals else []  # pyright: ignore
        images |= {reconstructed[k]: image for k, image in zip(originals, decoded)}
    for i, image in images.items():
        records[i] = {"file": _save(batch[i], image, out, task), "seed": batch[i].seed}
    return records, images


def _save(sample: Sample, image: np.ndarray, out: Path, task: Task) -> str:
    """Save a generated image in GenEval's layout, or a reconstruction; returns the path relative to `out`."""
    if sample.kind == "reconstruct":
        file = f"reconstructions/{sample.index:06d}.png"
    else:
        # GenEval's own scripts read IMAGES/00000/{metadata.jsonl,samples/0000.png}
        file = f"images/{sample.id}.png"
        metadata = (out / file).parent.parent / "metadata.jsonl"
        if not metadata.exists():
            metadata.parent.mkdir(parents=True, exist_ok=True)
            metadata.write_text(json.dumps(task.truth["prompts"][task.truth["owners"][sample.index]]) + "\n")
    save_image(image, out / file)
    return file


def object_record(
    sample: Sample, records: dict[int, Record], correct: bool, reason: str, held_out: bool
) -> Record:
    """The record of `scores.jsonl` with the verdict on one image."""
    record = records.get(sample.index, {})
    return {
        "index": sample.index, "kind": "generate" if sample.malformed else sample.kind,
        "prompt": sample.prompt, "file": record.get("file"), "score": float(correct),
        "reason": reason or record.get("unclear", ""), "held_out": bool(held_out),
        **({"error": record["error"]} if record.get("error") else {}),
    }  # fmt: skip


def prompt_mean(records: Sequence[Record]) -> Metric:
    """The mean score with its bootstrap interval."""
    # resample prompts: images of one prompt are not independent
    scores = [r["score"] for r in records]
    interval = bootstrap(mean_columns(scores), [r["owner"] for r in records])
    return Metric(float(np.mean(scores)), len(records), interval)


def add_held_out_and_ceiling(metrics: dict[str, Metric], per_sample: Sequence[Record]) -> None:
    """Add the scores of held-out pairs and of reconstructions, which the main metrics exclude."""
    held_out = [r for r in per_sample if r["kind"] == "generate" and r["held_out"]]
    reconstructed = [r for r in per_sample if r["kind"] == "reconstruct" and not r["held_out"]]
    if held_out:
        metrics["held-out pairs"] = prompt_mean(held_out)
    if reconstructed:
        metrics["ceiling"] = prompt_mean(reconstructed)
