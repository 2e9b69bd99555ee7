"""Zero-shot classification by the tokenizer's image and text embeddings: ImageNet, any folders, scenes."""

import functools
import importlib.resources
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing, read_json

from ..core import imagenet
from ..core.annotations import read_json_as, require_key, require_mostly_valid, require_type
from ..core.bootstrap import bootstrap, mean_columns
from ..core.harness import Metric, Record, Sample, Scored, Scoring, Settings, Task, malformed_sample
from ..core.image_files import open_images
from ..core.imagenet import SUFFIXES
from ..core.scenes import read_scenes

SCALE = 100.0  # the published evaluation's logits are 100 * image @ classifier
SCENE_TEMPLATES = ("{}", "an image of {}", "there is {}", "an image with {}")


def load_zeroshot(data: Path, settings: Settings) -> Task:
    """Images and captions of their classes.

    Scenes: single-object images against all colour x shape captions. `classes.json` beside a folder per
    class: {"classes": {folder: name}, "templates": ["a photo of a {}.", ...]}, without templates CLIP's 80.
    Else ImageNet (see `imagenet.find`) with CLIP's 80 templates and open_clip's names.
    """
    if (data / "scenes.json").exists():
        return load_scene_classes(data, settings)
    if (data / "classes.json").exists():
        return load_own_classes(data, settings)
    split = settings.split or "val"
    files = imagenet.find(existing(data), split)
    if files is None:
        raise UserError(
            f"{data}: nothing to classify. Expected ImageNet ({split}/n01440764/*.JPEG, a flat {split}/ with "
            f"LOC_{split}_solution.csv, or tars with .cls files) or a classes.json beside a folder per class."
        )
    names = imagenet.names()
    prompts = from_templates(names, clip_templates())
    about = {"split": split, "prompt_template": "CLIP's 80 templates, open_clip's 1000 names"}
    return zeroshot_task(files[: settings.limit], prompts, names, [False] * len(files), about, settings)


def load_own_classes(data: Path, settings: Settings) -> Task:
    """A folder per class and `classes.json`."""
    path = data / "classes.json"
    content = read_json_as(dict, path)
    names = require_type(dict, require_key(content, "classes", path), f"{path}, classes")
    templates = content.get("templates") or clip_templates()
    if bad := [t for t in templates if str(t).count("{}") != 1]:
        raise UserError(f"{path}: the template {bad[0]!r} does not hold {{}} exactly once.")
    prompts = from_templates(list(names.values()), templates)
    files: imagenet.Labelled = [
        (p, number)
        for number, folder in enumerate(names)
        for p in sorted(existing(data / folder).iterdir())
        if p.suffix in SUFFIXES
    ]
    about = {
        "prompt_template": "templates of classes.json" if content.get("templates") else "CLIP's 80 templates"
    }
    kept = files[: settings.limit]
    return zeroshot_task(kept, prompts, list(names.values()), [False] * len(files), about, settings)


def load_scene_classes(data: Path, settings: Settings) -> Task:
    """The test images of scenes that hold one object."""
    scenes = read_json(data / "scenes.json")
    words = [
        require_type(dict, require_key(scenes, key, "scenes.json"), f"scenes.json, {key}")
        for key in ("palette", "outlines")
    ]
    pairs = list(itertools.product(*words))
    names = [with_article(f"{colour} {shape}") for colour, shape in pairs]
    held_out = {tuple(pair) for pair in scenes.get("held_out", ())}
    files, apart = [], []
    for i, scene in enumerate(read_scenes(data / "test" / "captions.json")):
        if isinstance(scene, UserError):  # it may have been of one object
            files.append((data / "test" / f"entry {i}", scene))
            apart.append(False)
        elif len(scene.objects) == 1:
            pair = (scene.objects[0]["color"], scene.objects[0]["shape"])
            unknown = UserError(f"{scene.file} shows a {' '.join(pair)}, which scenes.json does not know.")
            files.append((data / "test" / scene.file, pairs.index(pair) if pair in pairs else unknown))
            apart.append(pair in held_out)
    prompts = from_templates(names, SCENE_TEMPLATES)
    return zeroshot_task(
        files[: settings.limit], prompts, names, apart, {"prompt_template": "scenes"}, settings
    )


def zeroshot_task(
    files: imagenet.Labelled,
    prompts: list[list[str]],
    names: list[str],
    apart: list[bool],
    about: dict[str, Any],
    settings: Settings,
) -> Task:
    """The samples; their truth is (class of each, prompts, names, whether each is scored apart)."""
    if not files:
        raise UserError("There are no images to classify.")
    samples = [
        malformed_sample(i, f.name, c, f)
        if isinstance(c, UserError)
        else Sample(i, f.name, "", f, "classify")
        for i, (f, c) in enumerate(files)
    ]
    classes = [-1 if isinstance(c, UserError) else c for _, c in files]
    truth = {"classes": classes, "prompts": prompts, "names": names, "apart": apart}
    about |= {"classes": len(names), "prompts per class": len(prompts[0])}
    require_mostly_valid(samples, files[0][0].parent)
    return Task(samples, truth, about | {"preprocessing": f"{settings.crop or 'lanczos'} crop"})


def with_article(name: str) -> str:
    """ "a red circle", "an orange circle"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def classify(model: Any, batch: list[Sample], out: Path, task: Task) -> list[Record]:
    """Note each image's five best classes."""
    weights = task.truth.get("weights")
    if weights is None:  # the classifier is built once per run
        weights = task.truth["weights"] = classifier(task.truth["prompts"], model.embed_texts)
    rows, images = open_images(batch)
    if images:
        embeds = model.embed_images(list(images.values()))
        for i, five in zip(images, best(logits(embeds, weights), 5).tolist()):
            rows[i] = {"best": five}
    return rows


def score_zeroshot(
    task: Task, rows: dict[int, Record], folder: Path, run: dict[str, Any], scoring: Scoring
) -> Scored:
    """Top-1 and top-5; images of pairs that training never showed apart."""
    classes, names, apart = task.truth["classes"], task.truth["names"], np.array(task.truth["apart"])
    choices = [rows.get(s.index, {}).get("best", []) for s in task.samples]
    hits = {k: np.array(v, float) for k, v in score(choices, classes).items()}
    result = {}
    for label, keep in (("", ~apart), ("/held-out pairs", apart)):
        keep = keep[: len(choices)]
        for name, values in hits.items():
            if keep.any():
                chosen = values[keep]
                result[name + label] = Metric(
                    float(chosen.mean()), len(chosen), bootstrap(mean_columns(chosen))
                )
    chance = 1 / len(names)
    return Scored(result, {"chance": chance, "classes": names}, [
        {
            "index": s.index, "image": str(s.image), "truth": "" if s.malformed else names[c],
            "answer": names[b[0]] if b else None, "score": float(hit), "held_out": bool(far),
        }
        for s, c, b, hit, far in zip(task.samples, classes, choices, hits["top1"], apart)
    ])  # fmt: skip


def classifier(
    prompts: Sequence[Sequence[str]], embed: Callable[[list[str]], np.ndarray], batch: int = 256
) -> np.ndarray:
    """Classifier (E, C) with unit columns: per class the normalised mean of its prompts' unit embeddings.

    Args:
        prompts: for each class its prompts, at least one.
        embed: texts -> embeddings (len, E); they are normalised here, whatever their length.
    """
    if not prompts or not all(prompts):
        raise UserError("Every class needs at least one prompt.")
    texts = list(itertools.chain.from_iterable(prompts))
    rows = np.concatenate(
        [np.asarray(embed(texts[i : i + batch]), np.float64) for i in range(0, len(texts), batch)]
    )
    parts = np.split(unit(rows), np.cumsum([len(p) for p in prompts])[:-1])
    return unit(np.stack([part.mean(axis=0) for part in parts])).T


@functools.cache
def clip_templates() -> list[str]:
    """The 80 templates that OpenAI published with CLIP for ImageNet (data file `clip_templates.json`)."""
    return json.loads(
        importlib.resources.files("open_unitok.eval.tokenizer")
        .joinpath("clip_templates.json")
        .read_text(encoding="utf-8")
    )


def from_templates(names: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """For each class name its prompts; a template holds one `{}`."""
    return [[template.format(name) for template in templates] for name in names]


def logits(image_embeds: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(B, E) unit embeddings and (E, C) classifier -> logits (B, C)."""
    return SCALE * np.asarray(image_embeds, np.float64) @ weights


def best(values: np.ndarray, k: int) -> np.ndarray:
    """Indices (B, k) of the k largest logits, best first; the lower index wins a tie."""
    return np.argsort(-values, axis=1, kind="stable")[:, : min(k, values.shape[1])]


def score(choices: Sequence[Sequence[int]], targets: Sequence[int]) -> Mapping[str, list[bool]]:
    """Per image whether its class is the first, and among the first five, of its `choices`."""
    return {
        "top1": [target in list(row)[:1] for row, target in zip(choices, targets)],
        "top5": [target in list(row)[:5] for row, target in zip(choices, targets)],
    }


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
