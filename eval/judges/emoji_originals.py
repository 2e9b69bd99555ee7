"""Nearest originals of generated or reconstructed emoji: the same emoji, and in the same style?

The originals are those of all splits, so chance is one in 1,900. Differences are squared, of pixels.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing

from ..core.annotations import read_json_as, require_mostly_valid, require_text, require_type
from ..core.benchmark import Metric, Options, Record, Sample, Scored, Task
from ..core.image_files import read_sample_image
from . import ceiling
from .nearest_originals import NearestOriginals

ITEMS = "items.json"


def load_generated(data: Path, settings: Options) -> Task:
    """The prompts of a split (train, validation, pairs or unseen), and its images for the ceiling."""
    items = read_items(data)[: settings.limit]
    per_prompt = settings.images_per_prompt or 1
    samples, owners = ceiling.generation_samples(items, per_prompt, settings.seed)
    return _task(data, items, samples, owners, {"images per prompt": per_prompt})


def load_reconstructions(data: Path, settings: Options) -> Task:
    """The images of a split, which are reconstructed."""
    return _task(data, read_items(data)[: settings.limit], [], [], {})


def _task(data: Path, items: list[Record], samples: list[Sample], owners: list[int], more: Record) -> Task:
    generated = bool(samples)
    for owner, item in enumerate(items):
        malformed = item.get("malformed", "")
        if malformed and generated:
            continue  # its generated image counts as wrong
        file = item.get("file", f"#{owner}")
        image = None if malformed else data / file
        samples.append(Sample(len(samples), file, item["prompt"], image, "reconstruct", malformed=malformed))
        owners.append(owner)
    require_mostly_valid(samples, data / ITEMS)
    data = data.resolve()
    existing(data.parent / "train" / ITEMS, "Images are compared with the originals of all splits.")
    folders = sorted(path.parent for path in data.parent.glob(f"*/{ITEMS}"))
    truth = {"prompts": items, "owners": owners, "folders": folders}
    originals = ", ".join(folder.name for folder in folders)
    return Task(samples, truth, {"split": data.name, "prompts": len(items), "originals": originals, **more})


def read_items(data: Path) -> list[Record]:
    """Items of a split; a malformed one has the error under "malformed", and counts as wrong."""
    path = existing(data / ITEMS, "`unitok data emoji` writes it; give the folder of a split, such as pairs.")
    items = []
    for i, row in enumerate(read_json_as(list, path)):
        try:
            for key in ("file", "prompt", "name", "style", "category"):
                require_text(row, key, f"{path}, entry {i}")
            require_type(list, row.get("questions"), f"{path}, entry {i}, questions")
            items.append(row)
        except UserError as error:
            items.append({"prompt": "", "name": "", "style": "", "questions": [], "malformed": str(error)})
    return items


def answer(model: Any, batch: list[Sample], out: Path, task: Task) -> list[Record]:
    """Generate or reconstruct a batch and save it."""
    return ceiling.generate_and_reconstruct(model, batch, out, task)[0]


def score(
    task: Task, records: dict[int, Record], folder: Path, run: dict[str, Any], scoring: Options
) -> Scored:
    """The fraction of images that are nearest to an original of their emoji, and to that of their style too.

    The ceiling is the same of reconstructions; without generated images, those are the result.
    """
    per_sample = _find_nearest(task, records, folder)
    by_kind = {
        kind: [r for r in per_sample if r["kind"] == kind] for kind in ("generate", "reconstruct")
    }  # fmt: skip
    main = by_kind["generate"] or by_kind["reconstruct"]
    metrics = {"emoji": ceiling.prompt_mean(main), "emoji in its style": _style_mean(main)}
    if by_kind["generate"] and by_kind["reconstruct"]:
        metrics["ceiling"] = ceiling.prompt_mean(by_kind["reconstruct"])
        metrics["ceiling in its style"] = _style_mean(by_kind["reconstruct"])
    return Scored(metrics, {}, per_sample)


def _style_mean(rows: list[Record]) -> Metric:
    return ceiling.prompt_mean([row | {"score": row["in_style"]} for row in rows])


def _find_nearest(task: Task, records: dict[int, Record], folder: Path) -> list[Record]:
    items, owners = task.truth["prompts"], task.truth["owners"]
    originals, labels = _read_originals(task.truth["folders"])
    finder, per_sample, of_name = NearestOriginals(originals), [], defaultdict(list)
    for number, (name, _) in enumerate(labels):
        of_name[name].append(number)
    for sample in task.samples:
        item, file = items[owners[sample.index]], records.get(sample.index, {}).get("file")
        right, in_style, reason = False, False, "no image"
        if file and not sample.malformed:
            image = np.asarray(read_sample_image(folder / file))
            nearest = finder.nearest(image)
            reason = "nearest: {}, {} style".format(*labels[nearest])
            best = finder.distances(image, [nearest])[0]
            # equal images are equally right
            own = [labels[i] for i in of_name[item["name"]] if finder.distances(image, [i])[0] <= best]
            right, in_style = bool(own), (item["name"], item["style"]) in own
        record = ceiling.object_record(sample, records, right, "" if in_style else reason, False)
        per_sample.append(
            {
                **record,
                # that of a malformed sample is not in its record
                "kind": "reconstruct" if sample.kind == "reconstruct" else "generate",
                "owner": owners[sample.index],
                "group": item["style"],
                "in_style": float(in_style),
            }
        )
    return per_sample


def _read_originals(folders: list[Path]) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Pixels (N, H, W, 3) and (name, style) of the images of all splits."""
    images, labels = [], []
    for folder in folders:
        for item in read_items(folder):
            if "malformed" not in item:
                images.append(np.asarray(read_sample_image(folder / item["file"])))
                labels.append((item["name"], item["style"]))
    return np.stack(images), labels
