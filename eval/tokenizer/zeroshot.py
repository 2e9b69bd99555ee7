"""Zero-shot classification by image and text embeddings (UniTok, section 4): ImageNet, folders, scenes.

B images, C classes, E embedding width.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing
from open_unitok.core.text_files import read_json, read_lines

from ..core import imagenet
from ..core.annotations import read_scenes, require_key, require_mostly_valid, require_type
from ..core.benchmark import Metric, Options, Record, Sample, Scored, Task, malformed_sample
from ..core.bootstrap import bootstrap, mean_columns
from ..core.image_files import list_images, open_images
from ..core.release_files import image_finder

LOGIT_SCALE = 100.0  # the published evaluation's logits are 100 * image @ classifier
SCENE_TEMPLATES = ("{}", "a picture of {}", "there is {}", "an image with {}")


def load(data: Path, settings: Options) -> Task:
    """Images and the prompts of their classes.

    Scenes: single-object images, with all colour-shape pairs as classes. `classes.json`:
    {"classes": {folder: name}, or a list of names; "templates": ["a photo of a {}.", ...]; "images":
    {file: class}}, or the list alone; `classes.txt`: a name per line. The default templates are CLIP's.
    Otherwise ImageNet (`imagenet.find_labelled_images`), CLIP's 80 templates and open_clip's names.
    """
    if (data / "scenes.json").exists():
        return _load_scenes(data, settings)
    if data.is_file() and data.suffix in (".json", ".txt"):
        return _load_class_list(data, settings)
    for path in (data / "classes.json", data / "classes.txt"):
        if path.exists():
            return _load_class_list(path, settings)
    split = settings.split or "val"
    files = imagenet.find_labelled_images(existing(data), split)
    if files is None:
        raise UserError(
            f"{data}: nothing to classify. Expected ImageNet ({split}/n01440764/*.JPEG, a flat {split}/ with "
            f"LOC_{split}_solution.csv, or tars with .cls files), or classes.json or classes.txt beside the "
            "images."
        )
    names = imagenet.class_names()
    prompts = fill_templates(names, clip_templates())
    metadata = {"split": split, "prompt_template": "CLIP's 80 templates, open_clip's 1000 names"}
    return _zeroshot_task(files[: settings.limit], prompts, names, [False] * len(files), metadata, settings)


def _load_class_list(path: Path, settings: Options) -> Task:
    """The task of `classes.json` or `classes.txt`.

    A class has a folder of images, or images listed under "images", {file: class}, or none: it is then a
    wrong choice for the images of the others.
    """
    names, files, content = read_class_list(path)
    own = content.get("templates")
    templates = own or clip_templates()
    # a template without {} would give all classes the same prompt
    if bad := [t for t in templates if str(t).count("{}") != 1]:
        raise UserError(f"{path}: template {bad[0]!r} must contain {{}} exactly once.")
    if not files:
        raise UserError(
            f"{path}: there are no images of its {len(names)} classes: neither a folder of a class nor "
            '"images", {file: class}.'
        )
    unused = sorted(set(range(len(names))) - {number for _, number in files if isinstance(number, int)})
    class_names = list(names.values())
    problems = (
        [f"{len(unused)} classes have no images, for instance {class_names[unused[0]]}"] if unused else []
    )
    metadata = {"prompt_template": f"templates of {path.name}" if own else "CLIP's 80 templates"}
    prompts = fill_templates(class_names, templates)
    kept = files[: settings.limit]
    task = _zeroshot_task(kept, prompts, class_names, [False] * len(files), metadata, settings)
    return task._replace(problems=problems)


def read_class_list(path: Path) -> tuple[dict[str, str], imagenet.LabelledImages, dict[str, Any]]:
    """Of `classes.json` or `classes.txt`: the classes (folder -> name), (image, class number), the content.

    Raises:
        UserError: fewer than two classes, or one without a name.
    """
    content: Any = read_lines(path) if path.suffix == ".txt" else read_json(existing(path))
    content = content if isinstance(content, dict) and "classes" in content else {"classes": content}
    listed = content["classes"]
    # a list of names, or folder -> name
    if isinstance(listed, list):
        listed = {name: name for name in listed}
    names: dict[str, str] = require_type(dict, listed, f"{path}, classes")
    if len(names) < 2 or not all(isinstance(name, str) and name.strip() for name in names.values()):
        raise UserError(f"{path}: classes must be two names or more, got {list(names.values())[:3]}.")
    return names, _images_of_classes(path, names, content.get("images") or {}), content


def _images_of_classes(path: Path, names: dict[str, str], images: Any) -> imagenet.LabelledImages:
    """(image, class number) of the folders that are named as a class, and of the listed images."""
    bases = [path.parent, *(path.parent / split for split in ("val", "test", "images"))]
    files: imagenet.LabelledImages = []
    for number, (folder, name) in enumerate(names.items()):
        places = dict.fromkeys(base / part for base in bases for part in (folder, name))
        for place in places:
            if place.is_dir():
                files += [(p, number) for p in list_images(place, recursive=False)]
    numbers = {key: n for n, pair in enumerate(names.items()) for key in reversed(pair)}
    find_image = image_finder(bases)
    for file, label in require_type(dict, images, f"{path}, images").items():
        unknown = UserError(f"{path}: {file} is of class {label!r}, which classes lacks.")
        files.append((find_image(file), numbers.get(label, unknown) if isinstance(label, str) else unknown))
    return files


def _load_scenes(data: Path, settings: Options) -> Task:
    """The task of the test images of scenes with a single object."""
    scenes = read_json(data / "scenes.json")
    words = [
        require_type(dict, require_key(scenes, key, "scenes.json"), f"scenes.json, {key}")
        for key in ("palette", "outlines")
    ]
    pairs = list(itertools.product(*words))
    names = [_with_article(f"{colour} {shape}") for colour, shape in pairs]
    held_out_pairs = {tuple(pair) for pair in scenes.get("held_out", ())}
    files, held_out = [], []
    for i, scene in enumerate(read_scenes(data / "test" / "captions.json")):
        if isinstance(scene, UserError):  # counts as wrong: it might have one object
            files.append((data / "test" / f"entry {i}", scene))
            held_out.append(False)
        elif len(scene.objects) == 1:
            # one object: a single class describes the image
            pair = (scene.objects[0]["color"], scene.objects[0]["shape"])
            unknown = UserError(f"{scene.file} shows a {' '.join(pair)}, which is not in scenes.json.")
            files.append((data / "test" / scene.file, pairs.index(pair) if pair in pairs else unknown))
            held_out.append(pair in held_out_pairs)
    prompts, metadata = fill_templates(names, SCENE_TEMPLATES), {"prompt_template": "scenes"}
    return _zeroshot_task(files[: settings.limit], prompts, names, held_out, metadata, settings)


def _zeroshot_task(
    files: imagenet.LabelledImages,
    prompts: list[list[str]],
    names: list[str],
    held_out: list[bool],
    metadata: dict[str, Any],
    settings: Options,
) -> Task:
    """The task: samples, and as truth classes, prompts, class names and held-out flags."""
    if not files:
        raise UserError("There are no images to classify.")
    samples = [
        malformed_sample(i, f.name, c, f)
        if isinstance(c, UserError)
        else Sample(i, f.name, "", f, "classify")
        for i, (f, c) in enumerate(files)
    ]
    classes = [-1 if isinstance(c, UserError) else c for _, c in files]
    truth = {"classes": classes, "prompts": prompts, "names": names, "held_out": held_out}
    metadata |= {"classes": len(names), "prompts per class": len(prompts[0])}
    require_mostly_valid(samples, files[0][0].parent)
    return Task(samples, truth, metadata | {"preprocessing": f"{settings.crop or 'lanczos'} crop"})


def _with_article(name: str) -> str:
    """ "a red circle", "an orange circle"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def answer(model: Any, batch: list[Sample], out: Path, task: Task) -> list[Record]:
    """Record the five best classes of each image."""
    weights = task.truth.get("weights")
    if weights is None:  # built once per run: ImageNet has 80,000 prompts
        weights = task.truth["weights"] = build_classifier(task.truth["prompts"], model.embed_texts)
    records, images = open_images(batch)
    if images:
        embeds = model.embed_images(list(images.values()))
        for i, best in zip(images, top_classes(class_logits(embeds, weights), 5).tolist()):
            records[i] = {"best": best}
    return records


def score(
    task: Task, records: dict[int, Record], folder: Path, run: dict[str, Any], scoring: Options
) -> Scored:
    """Top-1 and top-5 accuracy, separately for held-out pairs."""
    classes, names = task.truth["classes"], task.truth["names"]
    # --limit shortens the samples, not the list of flags
    held_out = np.array(task.truth["held_out"])[: len(task.samples)]
    choices = [records.get(s.index, {}).get("best", []) for s in task.samples]
    hits = {k: np.array(v, float) for k, v in topk_hits(choices, classes).items()}
    if len(names) <= 5:  # five of five classes are always right
        del hits["top5"]
    metrics = {}
    # without held-out pairs the second mask is empty: its metrics are left out
    for suffix, mask in (("", ~held_out), ("/held-out pairs", held_out)):
        for name, values in hits.items():
            if mask.any():
                chosen = values[mask]
                interval = bootstrap(mean_columns(chosen))
                metrics[name + suffix] = Metric(float(chosen.mean()), len(chosen), interval)
    return Scored(metrics, {"chance": 1 / len(names), "classes": names}, [
        {
            "index": s.index, "image": str(s.image), "truth": "" if s.malformed else names[c],
            "answer": names[b[0]] if b else None, "score": float(hit), "held_out": bool(h),
        }
        for s, c, b, hit, h in zip(task.samples, classes, choices, hits["top1"], held_out)
    ])  # fmt: skip


# ------------------------------------------------------------------------------------------------- classifier


@functools.cache
def clip_templates() -> list[str]:
    """The 80 templates that OpenAI published with CLIP for ImageNet (data file `clip_templates.json`)."""
    return read_json(Path(__file__).with_name("clip_templates.json"))


def fill_templates(names: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """The prompts of each class name; a template holds one `{}`."""
    return [[template.format(name) for template in templates] for name in names]


def build_classifier(
    prompts: Sequence[Sequence[str]], embed: Callable[[list[str]], np.ndarray], batch: int = 256
) -> np.ndarray:
    """Classifier (E, C) with unit columns: the normalised mean of the unit embeddings of a class's prompts.

    Args:
        prompts: the prompts of each class, at least one.
        embed: texts -> embeddings (len(texts), E), not necessarily unit vectors.
    """
    if not prompts or not all(prompts):
        raise UserError("Every class needs at least one prompt.")
    # one flat list, so that batches are full for any number of prompts per class
    texts = list(itertools.chain.from_iterable(prompts))
    rows = np.concatenate(
        [np.asarray(embed(texts[i : i + batch]), np.float64) for i in range(0, len(texts), batch)]
    )
    # CLIP's prompt ensembling: the normalised mean of unit vectors
    per_class = np.split(unit_rows(rows), np.cumsum([len(p) for p in prompts])[:-1])
    return unit_rows(np.stack([embeds.mean(axis=0) for embeds in per_class])).T


def class_logits(image_embeds: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(B, E) unit embeddings and (E, C) classifier -> logits (B, C)."""
    return LOGIT_SCALE * np.asarray(image_embeds, np.float64) @ weights


def top_classes(logits: np.ndarray, k: int) -> np.ndarray:
    """Indices (B, k) of the k largest logits, best first; ties go to the lower index."""
    # stable: ties do not depend on the platform
    return np.argsort(-logits, axis=1, kind="stable")[:, : min(k, logits.shape[1])]


def topk_hits(choices: Sequence[Sequence[int]], targets: Sequence[int]) -> Mapping[str, list[bool]]:
    """Per image whether its class is the first, or one of the first five, of its choices."""
    return {
        "top1": [target in list(row)[:1] for row, target in zip(choices, targets)],
        "top5": [target in list(row)[:5] for row, target in zip(choices, targets)],
    }


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1."""
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
