"""Zero-shot classification by the tokenizer's image and text embeddings: ImageNet, any folders, scenes."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing, read_json

from ..core import imagenet
from ..core.annotations import entry, of_kind, read_as, usable
from ..core.bootstrap import bootstrap, with_ones
from ..core.harness import Metric, Row, Sample, Scored, Scoring, Settings, Task, malformed
from ..core.imagenet import SUFFIXES
from ..core.scenes import read_scenes
from . import zeroshot_classifier
from .reconstruction import open_images

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
    prompts = zeroshot_classifier.from_templates(names, zeroshot_classifier.clip_templates())
    about = {"split": split, "recipe": "CLIP's 80 templates, open_clip's 1000 names"}
    return zeroshot_task(files[: settings.limit], prompts, names, [False] * len(files), about, settings)


def load_own_classes(data: Path, settings: Settings) -> Task:
    """A folder per class and `classes.json`."""
    path = data / "classes.json"
    content = read_as(dict, path)
    names = of_kind(dict, entry(content, "classes", path), f"{path}, classes")
    templates = content.get("templates") or zeroshot_classifier.clip_templates()
    if bad := [t for t in templates if str(t).count("{}") != 1]:
        raise UserError(f"{path}: the template {bad[0]!r} does not hold {{}} exactly once.")
    prompts = zeroshot_classifier.from_templates(list(names.values()), templates)
    files: imagenet.Labelled = [
        (p, number)
        for number, folder in enumerate(names)
        for p in sorted(existing(data / folder).iterdir())
        if p.suffix in SUFFIXES
    ]
    about = {"recipe": "templates of classes.json" if content.get("templates") else "CLIP's 80 templates"}
    kept = files[: settings.limit]
    return zeroshot_task(kept, prompts, list(names.values()), [False] * len(files), about, settings)


def load_scene_classes(data: Path, settings: Settings) -> Task:
    """The test images of scenes that hold one object."""
    scenes = read_json(data / "scenes.json")
    words = [
        of_kind(dict, entry(scenes, key, "scenes.json"), f"scenes.json, {key}")
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
    prompts = zeroshot_classifier.from_templates(names, SCENE_TEMPLATES)
    return zeroshot_task(files[: settings.limit], prompts, names, apart, {"recipe": "scenes"}, settings)


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
        malformed(i, f.name, c, f) if isinstance(c, UserError) else Sample(i, f.name, "", f, "classify")
        for i, (f, c) in enumerate(files)
    ]
    classes = [-1 if isinstance(c, UserError) else c for _, c in files]
    truth = {"classes": classes, "prompts": prompts, "names": names, "apart": apart}
    about |= {"classes": len(names), "prompts per class": len(prompts[0])}
    usable(samples, files[0][0].parent)
    return Task(samples, truth, about | {"preprocessing": f"{settings.crop or 'lanczos'} crop"})


def with_article(name: str) -> str:
    """ "a red circle", "an orange circle"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def classify(model: Any, batch: list[Sample], out: Path, task: Task) -> list[Row]:
    """Note each image's five best classes."""
    weights = task.truth.get("weights")
    if weights is None:  # the classifier is built once per run
        weights = task.truth["weights"] = zeroshot_classifier.classifier(
            task.truth["prompts"], model.embed_texts
        )
    rows, images = open_images(batch)
    if images:
        embeds = model.embed_images(list(images.values()))
        for i, best in zip(
            images, zeroshot_classifier.best(zeroshot_classifier.logits(embeds, weights), 5).tolist()
        ):
            rows[i] = {"best": best}
    return rows


def score_zeroshot(
    task: Task, rows: dict[int, Row], folder: Path, run: dict[str, Any], scoring: Scoring
) -> Scored:
    """Top-1 and top-5; images of pairs that training never showed apart."""
    classes, names, apart = task.truth["classes"], task.truth["names"], np.array(task.truth["apart"])
    choices = [rows.get(s.index, {}).get("best", []) for s in task.samples]
    hits = {k: np.array(v, float) for k, v in zeroshot_classifier.score(choices, classes).items()}
    result = {}
    for label, keep in (("", ~apart), ("/held-out pairs", apart)):
        keep = keep[: len(choices)]
        for name, values in hits.items():
            if keep.any():
                chosen = values[keep]
                result[name + label] = Metric(float(chosen.mean()), len(chosen), bootstrap(with_ones(chosen)))
    chance = 1 / len(names)
    return Scored(result, {"chance": chance, "classes": names}, [
        {
            "index": s.index, "image": str(s.image), "truth": "" if s.broken else names[c],
            "answer": names[b[0]] if b else None, "score": float(hit), "held_out": bool(far),
        }
        for s, c, b, hit, far in zip(task.samples, classes, choices, hits["top1"], apart)
    ])  # fmt: skip
