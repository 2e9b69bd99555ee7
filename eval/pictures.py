"""The benchmarks of the tokenizer: reconstruction of pictures, and zero-shot classification by captions.

B pictures, N visual tokens, K sub-codebooks.
"""

import base64
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from open_unitok.errors import UserError
from open_unitok.files import existing, read_json

from . import metrics, zeroshot
from .asking import read_picture
from .harness import Metric, Row, Sample, Scored, Scoring, Settings, Task
from .intervals import bootstrap, with_ones
from .vqa import entry

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".JPEG")
SCENE_TEMPLATES = ("{}", "a picture of {}", "there is {}", "an image with {}")


def load_reconstruction(data: Path, settings: Settings) -> Task:
    """Every picture of `data/test/images`, or of `data` and its folders, in the order of their names."""
    folder = next((f for f in (data / "test" / "images", data / "images") if f.is_dir()), existing(data))
    files = sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES)[: settings.limit]
    if not files:
        raise UserError(f"{folder} holds no pictures ({', '.join(SUFFIXES)}).")
    samples = [Sample(i, str(p.relative_to(folder)), "", p, "copy") for i, p in enumerate(files)]
    return Task(
        samples, None, {"split": str(folder), "preprocessing": "shorter side resized, centre cropped"}
    )


def reconstruct(model: Any, batch: list[Sample], out: Path, task: Task) -> list[Row]:
    """Write each picture's copy below `out/pictures` and note its codes."""
    rows, images = open_pictures(batch)
    if images:
        copies = model.reconstruct(list(images.values()))
        for i, copy, codes in zip(images, copies.copies, copies.codes):
            file = f"pictures/{batch[i].index:06d}.png"
            save_picture(copy, out / file)
            books = [codes.shape[1], copies.codebook_size]
            rows[i] = {"file": file, "codes": pack(codes), "codebooks": books}
    return rows


def open_pictures(batch: list[Sample]) -> tuple[list[Row], dict[int, Any]]:
    """Rows with an error where a picture cannot be read, and the pictures that can, by place in the batch."""
    rows: list[Row] = [{} for _ in batch]
    images = {}
    for i, sample in enumerate(batch):
        try:
            images[i] = read_picture(sample.image)
        except UserError as error:
            rows[i] = {"error": str(error)}
    return rows, images


def save_picture(picture: np.ndarray, path: Path) -> None:
    """uint8 (H, W, 3) to a PNG."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def pack(codes: np.ndarray) -> str:
    """(N, K) codes below 65,536 -> text."""
    return base64.b64encode(codes.astype("<u2").tobytes()).decode()


def unpack(text: str, sub_codebooks: int) -> np.ndarray:
    """The inverse of `pack`, (N, K)."""
    return np.frombuffer(base64.b64decode(text), "<u2").reshape(-1, sub_codebooks)


def score_reconstruction(
    task: Task, rows: dict[int, Row], folder: Path, run: dict[str, Any], scoring: Scoring
) -> Scored:
    """PSNR and SSIM per picture, and how much of the codebooks the pictures use."""
    mode = scoring.scorer
    good = [s for s in task.samples if s.index in rows and not rows[s.index].get("error")]
    if not good:
        raise UserError(f"{folder}: not one picture could be read, so there is nothing to score.")
    k, v = rows[good[0].index]["codebooks"]
    use = metrics.CodebookUse(k, v)
    psnr, ssim = [], []
    for batch in in_batches(good, 64):
        copies = [np.asarray(read_picture(folder / rows[s.index]["file"])) for s in batch]
        originals = originals_of(batch, copies[0].shape[0])
        psnr += metrics.psnr(originals, np.stack(copies)).tolist()
        ssim += metrics.ssim(originals, np.stack(copies), mode).tolist()
        use.add(np.concatenate([unpack(rows[s.index]["codes"], k) for s in batch]))
    used, perplexity = use.used(), use.perplexity()
    result = {
        "psnr": Metric(float(np.mean(psnr)), len(good), bootstrap(with_ones(psnr)), "dB"),
        "ssim": Metric(float(np.mean(ssim)), len(good), bootstrap(with_ones(ssim)), "ssim"),
        "codebook_usage_min": Metric(float(used.min()), len(good)),
        "codebook_perplexity_mean": Metric(float(perplexity.mean()), len(good), None, "entries"),
    }
    details = {
        "ssim_mode": mode,
        "codebook_size": v,
        "usage": used.tolist(),
        "perplexity": perplexity.tolist(),
        "tokens": int(use.counts.sum() // k),
    }
    return Scored(result, details, [
        {
            "index": s.index, "image": str(s.image), "copy": rows[s.index]["file"],
            "psnr": p, "ssim": q, "score": p,
        }
        for s, p, q in zip(good, psnr, ssim)
    ])  # fmt: skip


def originals_of(batch: list[Sample], size: int) -> np.ndarray:
    """The pictures as the tokenizer saw them, uint8 (B, size, size, 3)."""
    import torch

    from open_unitok.tokenizer.images import to_pixels, to_uint8

    pixels = torch.stack([to_pixels(read_picture(s.image), size, mode="crop") for s in batch])
    return to_uint8(pixels).permute(0, 2, 3, 1).numpy()


def in_batches(items: list, size: int) -> Iterator[list]:
    """Consecutive pieces of at most `size`."""
    return (items[i : i + size] for i in range(0, len(items), size))


# ------------------------------------------------------------------------------------------------- zero-shot


def load_zeroshot(data: Path, settings: Settings) -> Task:
    """Single-object pictures against all colour x shape captions; or a folder per class and `classes.json`.

    `classes.json` is {"classes": {folder: name}, "templates": ["a photo of a {}.", ...]}; without templates,
    CLIP's.
    """
    if (data / "scenes.json").exists():
        return load_scene_classes(data, settings)
    path = existing(data / "classes.json", "It names each class folder; scenes need none.")
    content = read_json(path)
    names = entry(content, "classes", path)
    templates = content.get("templates") or zeroshot.clip_templates()
    prompts = zeroshot.from_templates(list(names.values()), templates)
    files = [
        (p, number)
        for number, folder in enumerate(names)
        for p in sorted(existing(data / folder).iterdir())
        if p.suffix in SUFFIXES
    ]
    return zeroshot_task(files[: settings.limit], prompts, list(names.values()), [False] * len(files))


def load_scene_classes(data: Path, settings: Settings) -> Task:
    """The test pictures of scenes that hold one object."""
    scenes = read_json(data / "scenes.json")
    pairs = list(itertools.product(entry(scenes, "palette", "scenes.json"), scenes["outlines"]))
    names = [with_article(f"{colour} {shape}") for colour, shape in pairs]
    held_out = {tuple(pair) for pair in scenes.get("held_out", ())}
    path, files, apart = existing(data / "test" / "captions.json"), [], []
    for i, row in enumerate(read_json(path)):
        objects = entry(entry(row, "scene", f"{path}, entry {i}"), "objects", f"{path}, entry {i}")
        if len(objects) == 1:
            pair = (objects[0]["color"], objects[0]["shape"])
            files.append((data / "test" / row["file"], pairs.index(pair)))
            apart.append(pair in held_out)
    return zeroshot_task(
        files[: settings.limit], zeroshot.from_templates(names, SCENE_TEMPLATES), names, apart
    )


def zeroshot_task(
    files: list[tuple[Path, int]], prompts: list[list[str]], names: list[str], apart: list[bool]
) -> Task:
    """The samples; their truth is (class of each, prompts, names, whether each is scored apart)."""
    if not files:
        raise UserError("There are no pictures to classify.")
    samples = [Sample(i, f.name, "", f, "classify") for i, (f, _) in enumerate(files)]
    truth = {"classes": [c for _, c in files], "prompts": prompts, "names": names, "apart": apart}
    return Task(samples, truth, {"classes": len(names), "prompts per class": len(prompts[0])})


def with_article(name: str) -> str:
    """ "a red circle", "an orange circle"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def classify(model: Any, batch: list[Sample], out: Path, task: Task) -> list[Row]:
    """Note each picture's five best classes."""
    weights = task.truth.get("weights")
    if weights is None:  # the classifier is built once per run
        weights = task.truth["weights"] = zeroshot.classifier(task.truth["prompts"], model.embed_texts)
    rows, images = open_pictures(batch)
    if images:
        embeds = model.embed_images(list(images.values()))
        for i, best in zip(images, zeroshot.best(zeroshot.logits(embeds, weights), 5).tolist()):
            rows[i] = {"best": best}
    return rows


def score_zeroshot(
    task: Task, rows: dict[int, Row], folder: Path, run: dict[str, Any], scoring: Scoring
) -> Scored:
    """Top-1 and top-5; pictures of pairs that training never showed apart."""
    classes, names, apart = task.truth["classes"], task.truth["names"], np.array(task.truth["apart"])
    choices = [rows.get(s.index, {}).get("best", []) for s in task.samples]
    hits = {k: np.array(v, float) for k, v in zeroshot.score(choices, classes).items()}
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
            "index": s.index, "image": str(s.image), "truth": names[c],
            "answer": names[b[0]] if b else None, "score": float(hit), "held_out": bool(far),
        }
        for s, c, b, hit, far in zip(task.samples, classes, choices, hits["top1"], apart)
    ])  # fmt: skip
