"""Linear probe: a linear classifier on frozen features, trained by one of two published protocols.

"lbfgs" is the protocol of CLIP (logistic regression, sweep over L2 strengths), "sgd" that of MAE and DINO
(batch norm without parameters, 90 epochs, sweep over learning rates). Both select the setting on a tenth of
the training images, then train on all of them. N images, F features, C classes.
"""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from open_unitok.core.errors import UserError, did_you_mean

from ..core import imagenet
from ..core.annotations import require_mostly_valid
from ..core.benchmark import Metric, Options, Record, Sample, Scored, Task, malformed_sample
from ..core.bootstrap import bootstrap, mean_columns
from ..core.image_files import list_images, open_images
from .zeroshot import read_class_list

# features (F,) of an image, by option value
POOLINGS = {
    "embedding": "the CLIP branch's unit embedding, after quantisation",
    "quantised": "mean of the quantised latents over the visual tokens",
    "latents": "mean of the latents over the visual tokens, before quantisation",
}
L2_STRENGTHS = tuple(10.0**e for e in range(-6, 2))
LBFGS_STEPS = 200
LEARNING_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
SGD_EPOCHS, SGD_BATCH = 90, 1024
Probe = Callable[[Tensor], Tensor]


def load(data: Path, settings: Options) -> Task:
    """`train` and `val` of ImageNet (`imagenet.find_labelled_images`), or with a folder per class in each.

    Or a class list of `zeroshot`, whose key "train" names another one, relative to it, with the training
    images.
    """
    pooling = settings.pooling or "embedding"
    if pooling not in POOLINGS:
        raise UserError(f"pooling is {pooling!r}." + did_you_mean(pooling, POOLINGS))
    splits, names = _labelled_images(data)
    samples, labels, parts = [], [], []
    for part in ("train", "val"):
        for path, number in splits[part][: settings.limit]:
            name, malformed = f"{part}/{path.name}", isinstance(number, UserError)
            sample = Sample(len(samples), name, "", path, part)
            samples.append(malformed_sample(len(samples), name, number, path) if malformed else sample)
            labels.append(-1 if malformed else number)
            parts.append(part)
    metadata = {"split": "val", "prompt_template": f"{pooling}: {POOLINGS[pooling]}", "classes": len(names)}
    truth = {"labels": labels, "names": names, "pooling": pooling, "parts": parts}
    return Task(require_mostly_valid(samples, data), truth, metadata)


def _labelled_images(data: Path) -> tuple[dict[str, imagenet.LabelledImages], list[str]]:
    """(image, class) pairs of train and val, and the names of the classes."""
    if data.is_file():
        return _listed_images(data)
    for part in ("train", "val"):
        if not (data / part).is_dir():
            raise UserError(f"{data} has no folder {part}; a linear probe needs train/ and val/.")
    train, val = imagenet.find_labelled_images(data, "train"), imagenet.find_labelled_images(data, "val")
    names = imagenet.class_names()
    # no ImageNet layout: the folders of train/ define the classes
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
                for p in list_images(data / part / name, recursive=False)
            ]
            for part in ("train", "val")
        )
    if not train or not val:
        raise UserError(f"{data}: train/ holds {len(train)} images, val/ {len(val)}; both must contain some.")
    return {"train": train, "val": val}, names  # pyright: ignore


def _listed_images(path: Path) -> tuple[dict[str, imagenet.LabelledImages], list[str]]:
    """As `_labelled_images`, of a class list and the one that its key "train" names."""
    names, val, content = read_class_list(path)
    if not isinstance(content.get("train"), str):
        raise UserError(f'{path} has no "train", the class list with the training images of a linear probe.')
    classes, train, _ = read_class_list(path.parent / content["train"])
    known = list(classes.values())
    unknown = next((name for name in names.values() if name not in known), None)
    if unknown is not None:
        raise UserError(f"{path} has the class {unknown!r}, which {content['train']} does not have.")
    # the training list numbers the classes
    numbers = [known.index(name) for name in names.values()]
    val = [(image, n if isinstance(n, UserError) else numbers[n]) for image, n in val]
    if not train or not val:
        raise UserError(
            f"{path} lists {len(val)} images, {content['train']} {len(train)}; both must list some."
        )
    return {"train": train, "val": val}, known


def answer(model: Any, batch: list[Sample], out: Path, task: Task) -> list[Record]:
    """Record the features of each image."""
    records, images = open_images(batch)
    if images:
        for i, vector in zip(images, model.features(list(images.values()), task.truth["pooling"])):
            # fp16: about 2 kB per image, for 1.28 million training images of ImageNet
            records[i] = {"vector": base64.b64encode(vector.astype("<f2").tobytes()).decode()}
    return records


def score(
    task: Task, records: dict[int, Record], folder: Path, run: dict[str, Any], scoring: Options
) -> Scored:
    """Top-1 and top-5 on val; an image without features is wrong in val and left out of train."""
    labels, names, parts = task.truth["labels"], task.truth["names"], task.truth["parts"]
    vectors = {i: record["vector"] for i, record in records.items() if "vector" in record}
    train = [s for s in task.samples if parts[s.index] == "train" and s.index in vectors]
    val = [s for s in task.samples if parts[s.index] == "val"]
    if len({labels[s.index] for s in train}) < 2:
        raise UserError(f"{folder}: training needs features of at least two classes.")
    x = torch.from_numpy(np.stack([_unpack(vectors[s.index]) for s in train]))
    y = torch.tensor([labels[s.index] for s in train])
    probe, chosen = fit_probe(x, y, len(names), scoring.scorer)
    best: dict[int, list[int]] = {}
    # images without features stay in val and count as wrong
    with_features = [s for s in val if s.index in vectors]
    if with_features:
        scores = probe(torch.from_numpy(np.stack([_unpack(vectors[s.index]) for s in with_features])))
        ranked = scores.topk(min(5, len(names)), dim=1).indices.tolist()
        best = {s.index: row for s, row in zip(with_features, ranked)}
    hits = {
        f"top{k}": [float(labels[s.index] in best.get(s.index, [])[:k]) for s in val]
        # top-5 of five or fewer classes is always 1
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
    # a train image without features only shrinks the training set, so it is a warning
    left_out = parts.count("train") - len(train)
    return Scored(metrics, details, [
        {
            "index": s.index, "image": str(s.image), "truth": "" if s.malformed else names[labels[s.index]],
            "answer": names[best[s.index][0]] if s.index in best else None, "score": hit,
        }
        for s, hit in zip(val, hits["top1"])
    ], problems=[f"{left_out} training images have no features (left out)"] * (left_out > 0))  # fmt: skip


def _unpack(text: str) -> np.ndarray:
    """The features of a record, (F,) float32."""
    return np.frombuffer(base64.b64decode(text), "<f2").astype(np.float32)


# --------------------------------------------------------------------------------------------------- training


class Trial(NamedTuple):
    """One setting of the sweep and its accuracy on the held-out images."""

    setting: float
    accuracy: float


def fit_probe(x: Tensor, y: Tensor, classes: int, protocol: str) -> tuple[Probe, dict[str, Any]]:
    """Sweep and train on features (N, F) and labels (N,); returns the probe, and details of the sweep."""
    # fixed split: all settings are compared on the same images
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held_out, rest = order[: max(1, len(x) // 10)], order[max(1, len(x) // 10) :]
    train, name, settings = (
        (fit_lbfgs, "L2 strength", L2_STRENGTHS)
        if protocol == "lbfgs"
        else (fit_sgd, "learning rate", LEARNING_RATES)
    )
    trials = []
    for setting in settings:
        correct = train(x[rest], y[rest], classes, setting)(x[held_out]).argmax(dim=1) == y[held_out]
        trials.append(Trial(setting, correct.float().mean().item()))
    # ties go to the first, which is the smallest setting
    best = max(trials, key=lambda trial: trial.accuracy)
    chosen = {name: best.setting, "held-out accuracy": best.accuracy, "swept": [tuple(t) for t in trials]}
    return train(x, y, classes, best.setting), chosen


def fit_lbfgs(x: Tensor, y: Tensor, classes: int, strength: float) -> Probe:
    """Minimise mean cross-entropy + strength / 2 |W|^2; the bias is not regularised."""
    standardise = _standardiser(x)
    # standardised, so that one range of L2 strengths fits all kinds of features
    z, weight = standardise(x), torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    # convex: the result does not depend on the initialisation
    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=LBFGS_STEPS, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(F.linear(z, weight, bias), y) + strength / 2 * weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)  # pyright: ignore[reportArgumentType]
    w, b = weight.detach(), bias.detach()
    return lambda q: F.linear(standardise(q), w, b)


def fit_sgd(x: Tensor, y: Tensor, classes: int, rate: float) -> Probe:
    """Batch norm without parameters and a linear layer, trained by SGD with momentum and cosine decay."""
    batch = min(SGD_BATCH, len(x))
    norm = torch.nn.BatchNorm1d(x.shape[1], affine=False)
    layer = torch.nn.Linear(x.shape[1], classes)
    # zero initialisation: the result does not depend on a seed
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    steps = SGD_EPOCHS * (len(x) // batch)
    optimiser = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    # own generator: the order does not depend on the global random state
    shuffling = torch.Generator().manual_seed(0)
    for _ in range(SGD_EPOCHS):
        for rows in torch.randperm(len(x), generator=shuffling)[: len(x) // batch * batch].split(batch):
            if len(rows) < 2:  # batch norm cannot estimate a variance from one row
                continue
            optimiser.zero_grad()
            F.cross_entropy(layer(norm(x[rows])), y[rows]).backward()
            optimiser.step()
            schedule.step()
    # inference uses the running statistics of the training images
    norm.eval()
    return torch.no_grad()(lambda q: layer(norm(q)))


def _standardiser(x: Tensor) -> Probe:
    """Features -> features with the training images' mean 0 and deviation 1."""
    mean, deviation = x.mean(dim=0), x.std(dim=0, correction=0).clamp(min=1e-6)
    return lambda z: (z - mean) / deviation
