"""Linear probe: how well one linear layer on frozen features tells classes apart.

Its two recipes are the scorers (see `linear`). F features.
"""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from open_unitok.core.errors import UserError, did_you_mean

from ..core import imagenet
from ..core.annotations import require_mostly_valid
from ..core.bootstrap import bootstrap, mean_columns
from ..core.harness import Metric, Record, Sample, Scored, Scoring, Settings, Task, malformed_sample
from ..core.image_files import open_images
from ..core.imagenet import SUFFIXES

if TYPE_CHECKING:  # torch is loaded by the functions that run it
    from torch import Tensor

# What is read, (B, F) per image.
POOLINGS = {
    "embedding": "the CLIP branch's unit embedding, after quantisation",
    "quantised": "mean of the quantised latents over the visual tokens",
    "latents": "mean of the latents over the visual tokens, before quantisation",
}
SCORERS = ("lbfgs", "sgd")
STRENGTHS = tuple(10.0**e for e in range(-6, 2))
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
EPOCHS, BATCH, STEPS = 90, 1024, 200
Probe = Callable[["Tensor"], "Tensor"]


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
            samples.append(malformed_sample(len(samples), name, number, path) if broken else sample)
            labels.append(-1 if broken else number)
            kinds.append(part)
    about = {"split": "val", "prompt_template": f"{pooling}: {POOLINGS[pooling]}", "classes": len(names)}
    truth = {"labels": labels, "names": names, "pooling": pooling, "parts": kinds}
    return Task(require_mostly_valid(samples, data), truth, about)


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


def read_features(model: Any, batch: list[Sample], out: Path, task: Task) -> list[Record]:
    """Note each image's features, in half precision."""
    rows, images = open_images(batch)
    if images:
        for i, vector in zip(images, model.pooled(list(images.values()), task.truth["pooling"])):
            rows[i] = {"vector": base64.b64encode(vector.astype("<f2").tobytes()).decode()}
    return rows


def score_probe(
    task: Task, rows: dict[int, Record], folder: Path, run: dict[str, Any], scoring: Scoring
) -> Scored:
    """Top-1 and top-5 on val; an image without features is wrong there, and left out of training."""
    import torch

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
    metrics = {k: Metric(float(np.mean(v)), len(v), bootstrap(mean_columns(v))) for k, v in hits.items()}
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
            "index": s.index, "image": str(s.image), "truth": "" if s.malformed else names[labels[s.index]],
            "answer": names[best[s.index][0]] if s.index in best else None, "score": hit,
        }
        for s, hit in zip(val, hits["top1"])
    ], problems=[f"{left_out} training images have no features (left out)"] * (left_out > 0))  # fmt: skip


def unpack(text: str) -> np.ndarray:
    """A row's features, (F,) float32."""
    return np.frombuffer(base64.b64decode(text), "<f2").astype(np.float32)


class Choice(NamedTuple):
    """A setting of the sweep and its accuracy on the held-out tenth."""

    setting: float
    accuracy: float


def fit(x: "Tensor", y: "Tensor", classes: int, recipe: str) -> tuple[Probe, dict[str, Any]]:
    """(N, F) features and (N,) labels -> what gives (N, C) scores, and what the sweep chose."""
    import torch

    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held, rest = order[: max(1, len(x) // 10)], order[max(1, len(x) // 10) :]
    train, name, settings = (
        (by_lbfgs, "L2 strength", STRENGTHS) if recipe == "lbfgs" else (by_sgd, "learning rate", RATES)
    )
    choices = []
    for setting in settings:
        right = train(x[rest], y[rest], classes, setting)(x[held]).argmax(dim=1) == y[held]
        choices.append(Choice(setting, right.float().mean().item()))
    best = max(choices, key=lambda c: c.accuracy)
    about = {name: best.setting, "held-out accuracy": best.accuracy, "swept": [tuple(c) for c in choices]}
    return train(x, y, classes, best.setting), about


def scaling(x: "Tensor") -> Probe:
    """Features -> mean 0 and deviation 1 as on the training images."""
    mean, deviation = x.mean(dim=0), x.std(dim=0, correction=0).clamp(min=1e-6)
    return lambda z: (z - mean) / deviation


def by_lbfgs(x: "Tensor", y: "Tensor", classes: int, strength: float) -> Probe:
    """The minimum of mean cross-entropy + strength / 2 |W|^2; the bias goes free."""
    import torch
    import torch.nn.functional as F

    scale = scaling(x)
    z, weight = scale(x), torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=STEPS, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> "Tensor":
        optimiser.zero_grad()
        value = F.cross_entropy(F.linear(z, weight, bias), y) + strength / 2 * weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)  # pyright: ignore[reportArgumentType]
    w, b = weight.detach(), bias.detach()
    return lambda q: F.linear(scale(q), w, b)


def by_sgd(x: "Tensor", y: "Tensor", classes: int, rate: float) -> Probe:
    """A linear layer behind batch norm without parameters: SGD with momentum, cosine schedule."""
    import torch
    import torch.nn.functional as F

    batch = min(BATCH, len(x))
    norm = torch.nn.BatchNorm1d(x.shape[1], affine=False)
    layer = torch.nn.Linear(x.shape[1], classes)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    steps = EPOCHS * (len(x) // batch)
    optimiser = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    draws = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        for piece in torch.randperm(len(x), generator=draws)[: len(x) // batch * batch].split(batch):
            if len(piece) < 2:  # batch norm has no spread to measure
                continue
            optimiser.zero_grad()
            F.cross_entropy(layer(norm(x[piece])), y[piece]).backward()
            optimiser.step()
            schedule.step()
    norm.eval()
    return torch.no_grad()(lambda q: layer(norm(q)))
