"""Retrieval by the tokenizer's image and text embeddings: which of 100 captions is an image's own, and back.

B images, E embedding width.
"""

from pathlib import Path
from typing import Any

import numpy as np

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing

from ..core.annotations import read_json_as, require_key, require_mostly_valid, require_text
from ..core.bootstrap import bootstrap, mean_columns
from ..core.harness import Metric, Record, Sample, Scored, Scoring, Settings, Task, malformed_sample
from ..core.image_files import open_images

POOL = 100  # images and captions that are told apart; the next 100 are another pool
DIGITS = 6  # of an embedding's numbers in the answers


def load_retrieval(data: Path, settings: Settings) -> Task:
    """`captions.json` beside the images, or in the `test/` of scenes: a list of {"file", "captions"}.

    The first caption of each image is taken; the last images, which fill no pool, are left out.
    """
    folder = data / "test" if (data / "scenes.json").exists() else data
    path = existing(folder / "captions.json", 'It is a list of {"file": ..., "captions": [...]}.')
    samples = []
    for i, row in enumerate(read_json_as(list, path)[: settings.limit]):
        where = f"{path}, entry {i}"
        try:
            file, captions = require_text(row, "file", where), require_key(row, "captions", where)
            if not isinstance(captions, list) or not captions or not isinstance(captions[0], str):
                raise UserError(f"{where}: captions is {captions!r}; it must be a list of texts.")
            samples.append(Sample(i, file, captions[0], folder / file, "retrieve"))
        except UserError as error:
            samples.append(malformed_sample(i, None, error))
    require_mostly_valid(samples, path)
    pool = min(POOL, len(samples))
    return Task(
        samples[: len(samples) // pool * pool], None, {"pool": pool, "prompt_template": "first caption"}
    )


def embed(model: Any, batch: list[Sample], out: Path, task: Task) -> list[Record]:
    """Note the embeddings of each image and of its caption."""
    rows, images = open_images(batch)
    if images:
        pictures = model.embed_images(list(images.values()))
        captions = model.embed_texts([batch[i].prompt for i in images])
        for i, picture, caption in zip(images, pictures, captions):
            rows[i] = {
                "image": picture.round(DIGITS).tolist(),
                "caption": caption.round(DIGITS).tolist(),
            }
    return rows


def hits(queries: np.ndarray, candidates: np.ndarray, names: list[str], k: int) -> np.ndarray:
    """(B,) whether one of the k best candidates has the query's own name; the lower index wins a tie.

    Args:
        queries, candidates: (B, E), pairs by index.
        names: what makes two candidates equal, such as the same caption of two images.
    """
    best = np.argsort(-(queries @ candidates.T), axis=1, kind="stable")[:, :k]
    return np.array([any(names[j] == name for j in row) for name, row in zip(names, best)], float)


def score_retrieval(
    task: Task, rows: dict[int, Record], folder: Path, run: dict[str, Any], scoring: Scoring
) -> Scored:
    """Recall at 1 and 5, in pools of 100 in the order of the file.

    An image that could not be read, or whose entry is malformed, is never found, and finds nothing.
    """
    size, samples = task.metadata["pool"], task.samples
    width = next((len(row["image"]) for row in rows.values() if "image" in row), 1)
    nothing = {"image": [0.0] * width, "caption": [0.0] * width}
    found: dict[str, list[float]] = {}
    for first in range(0, len(samples), size):
        pool = samples[first : first + size]
        kept = [rows.get(s.index, {}) for s in pool]
        there = np.array(["image" in row for row in kept], float)
        vectors = [row if "image" in row else nothing for row in kept]
        pictures, captions = (np.array([v[key] for v in vectors]) for key in ("image", "caption"))
        names = [s.prompt for s in pool]
        for k in (1, 5):
            for way, values in (
                ("image_to_text", hits(pictures, captions, names, k)),
                ("text_to_image", hits(captions, pictures, names, k)),
            ):
                found.setdefault(f"{way}/R@{k}", []).extend(values * there)
    metrics = {
        name: Metric(float(np.mean(values)), len(values), bootstrap(mean_columns(np.array(values))))
        for name, values in found.items()
    }
    per_sample = [
        {"index": s.index, "image": str(s.image), "truth": s.prompt, "score": float(hit)}
        for s, hit in zip(samples, found["image_to_text/R@1"])
    ]
    return Scored(metrics, {"chance": 1 / size}, per_sample)
