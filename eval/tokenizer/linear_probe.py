"""Linear probe: how well one linear layer on frozen features tells classes apart.

Its two recipes are the scorers (see `linear`). F features.
"""

import base64
from pathlib import Path
from typing import Any

import numpy as np

from open_unitok.core.errors import UserError, did_you_mean

from ..core import imagenet
from ..core.annotations import usable
from ..core.bootstrap import bootstrap, with_ones
from ..core.harness import Metric, Row, Sample, Scored, Scoring, Settings, Task, malformed
from ..core.imagenet import SUFFIXES
from .reconstruction import open_images

# What is read, (B, F) per image.
POOLINGS = {
    "embedding": "the CLIP branch's unit embedding, after quantisation",
    "quantised": "mean of the quantised latents over the visual tokens",
    "latents": "mean of the latents over the visual tokens, before quantisation",
}
SCORERS = ("lbfgs", "sgd")


def load_probe(data: Path, settings: Settings) -> Task:
    """`train` and `val` of ImageNet (see `imagenet.find`), or of a folder per class in each."""
    pooling = settings.pooling or "embedding"
    if pooling not in POOLINGS:
        raise UserError(f"pooling is {pooling!r}." + did_you_mean(pooling, POOLINGS))
    parts, names = labelled(data)
    samples, labels, kinds = [], [], []
    for part in ("train", "val"):
        for path, number in parts[part][: settings.limit]:
            name, broken = f"{part}/{path.name}", isinstance(number, UserError)
            sample = Sample(len(samples), name, "", path, part)
            samples.append(malformed(len(samples), name, number, path) if broken else sample)
            labels.append(-1 if broken else number)
            kinds.append(part)
    about = {"split": "val", "recipe": f"{pooling}: {POOLINGS[pooling]}", "classes": len(names)}
    truth = {"labels": labels, "names": names, "pooling": pooling, "parts": kinds}
    return Task(usable(samples, data), truth, about)


def labelled(data: Path) -> tuple[dict[str, imagenet.Labelled], list[str]]:
    """(image, class) of train and val, and the classes' names."""
    for part in ("train", "val"):
        if not (data / part).is_dir():
            raise UserError(f"{data} holds no folder {part}; a linear probe needs train/ and val/.")
    train, val = imagenet.find(data, "train"), imagenet.find(data, "val")
    names = imagenet.names()
    if train is None or val is None:
        names = sorted(p.name for p in (data / "train").iterdir() if p.is_dir())
        unknown = {p.name for p in (data / "val").iterdir() if p.is_dir()} - set(names)
        if unknown:
            raise UserError(f"{data / 'val'} has the class {min(unknown)!r}, which train/ does not have.")
        train, val = (
            [
                (p, n)
                for n, name in enumerate(names)
                if (data / part / name).is_dir()
                for p in sorted((data / part / name).iterdir())
                if p.suffix in SUFFIXES
            ]
            for part in ("train", "val")
        )
    if not train or not val:
        raise UserError(f"{data}: train/ holds {len(train)} images and val/ {len(val)}; both need some.")
    return {"train": train, "val": val}, names


def read_features(model: Any, batch: list[Sample], out: Path, task: Task) -> list[Row]:
    """Note each image's features, in half precision."""
    rows, images = open_images(batch)
    if images:
        for i, vector in zip(images, model.pooled(list(images.values()), task.truth["pooling"])):
            rows[i] = {"vector": base64.b64encode(vector.astype("<f2").tobytes()).decode()}
    return rows


def score_probe(
    task: Task, rows: dict[int, Row], folder: Path, run: dict[str, Any], scoring: Scoring
) -> Scored:
    """Top-1 and top-5 on val; an image without features is wrong there, and left out of training."""
    import torch

    from .linear_classifier import fit

    labels, names = task.truth["labels"], task.truth["names"]
    vectors = {i: row["vector"] for i, row in rows.items() if "vector" in row}
    parts = task.truth["parts"]
    train = [s for s in task.samples if parts[s.index] == "train" and s.index in vectors]
    val = [s for s in task.samples if parts[s.index] == "val"]
    if len({labels[s.index] for s in train}) < 2:
        raise UserError(f"{folder}: features of fewer than two classes to train on.")
    x = torch.from_numpy(np.stack([unpack(vectors[s.index]) for s in train]))
    y = torch.tensor([labels[s.index] for s in train])
    probe, chosen = fit(x, y, len(names), scoring.scorer)
    seen = [s for s in val if s.index in vectors]
    best: dict[int, list[int]] = {}
    if seen:
        scores = probe(torch.from_numpy(np.stack([unpack(vectors[s.index]) for s in seen])))
        ranked = scores.topk(min(5, len(names)), dim=1).indices.tolist()
        best = {s.index: row for s, row in zip(seen, ranked)}
    hits = {
        f"top{k}": [float(labels[s.index] in best.get(s.index, [])[:k]) for s in val]
        for k in ((1, 5) if len(names) > 5 else (1,))
    }
    metrics = {k: Metric(float(np.mean(v)), len(v), bootstrap(with_ones(v))) for k, v in hits.items()}
    details = {
        "features": POOLINGS[task.truth["pooling"]],
        "width": x.shape[1],
        "training images": len(train),
        "chosen": chosen,
        "chance": 1 / len(names),
    }
    left_out = parts.count("train") - len(train)
    return Scored(metrics, details, [
        {
            "index": s.index, "image": str(s.image), "truth": "" if s.broken else names[labels[s.index]],
            "answer": names[best[s.index][0]] if s.index in best else None, "score": hit,
        }
        for s, hit in zip(val, hits["top1"])
    ], problems=[f"{left_out} training images have no features (left out)"] * (left_out > 0))  # fmt: skip


def unpack(text: str) -> np.ndarray:
    """A row's features, (F,) float32."""
    return np.frombuffer(base64.b64decode(text), "<f2").astype(np.float32)
