"""Image-text retrieval by the tokenizer's embeddings: recall among a pool of candidates, both directions.

B images, E embedding width.
"""

from pathlib import Path
from typing import Any

import numpy as np

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing

from ..core.annotations import read_json_as, require_key, require_mostly_valid, require_text
from ..core.benchmark import Metric, Options, Record, Sample, Scored, Task, malformed_sample
from ..core.bootstrap import bootstrap, mean_columns
from ..core.image_files import open_images

_BLOCK = 1024  # queries that are compared at once
DIGITS = 6  # decimals of the recorded embeddings


def load(data: Path, settings: Options) -> Task:
    """`captions.json` next to the images, or in `test/` of scenes: a list of {"file", "captions"}.

    The first caption of each image is used.
    """
    folder = data / "test" if (data / "scenes.json").exists() else data
    if folder.is_file():
        folder = folder.parent
    path = existing(folder / "captions.json", 'It is a list of {"file": ..., "captions": [...]}.')
    samples = []
    for i, row in enumerate(read_json_as(list, path)[: settings.limit]):
        where = f"{path}, entry {i}"
        try:
            file, captions = require_text(row, "file", where), require_key(row, "captions", where)
            if not isinstance(captions, list) or not captions or not isinstance(captions[0], str):
                raise UserError(f"{where}: captions is {captions!r}; it must be a non-empty list of texts.")
            samples.append(Sample(i, file, captions[0], folder / file, "retrieve"))
        except UserError as error:
            samples.append(malformed_sample(i, None, error))
    require_mostly_valid(samples, path)
    # fewer images than candidates form one smaller pool; 0: all
    pool = min(settings.pool or len(samples), len(samples))
    return Task(samples, None, {"pool": pool, "prompt_template": "first caption"})


def answer(model: Any, batch: list[Sample], out: Path, task: Task) -> list[Record]:
    """Record the embeddings of each image and its caption."""
    records, images = open_images(batch)
    if images:
        image_embeds = model.embed_images(list(images.values()))
        text_embeds = model.embed_texts([batch[i].prompt for i in images])
        for i, image, text in zip(images, image_embeds, text_embeds):
            records[i] = {"image": image.round(DIGITS).tolist(), "caption": text.round(DIGITS).tolist()}
    return records


def retrieval_hits(queries: np.ndarray, candidates: np.ndarray, names: list[str], k: int) -> np.ndarray:
    """(B,) whether one of the k best candidates has the name of the query; ties go to the lower index.

    Args:
        queries, candidates: (B, E), pairs by index.
        names: candidates with equal names are equally correct, e.g. two images with the same caption.
    """
    hits = []
    # in blocks: all similarities of 50,000 captions would need 20 GB
    for start in range(0, len(queries), _BLOCK):
        similarity = queries[start : start + _BLOCK] @ candidates.T
        best = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
        hits += [any(names[j] == name for j in row) for name, row in zip(names[start:], best)]
    return np.array(hits, float)


def score(
    task: Task, records: dict[int, Record], folder: Path, run: dict[str, Any], scoring: Options
) -> Scored:
    """Recall at 1 and 5 among `pool` candidates; consecutive entries of the file form a pool.

    The entries that are left after the last full pool have the last `pool` entries as candidates. An
    unreadable image or malformed entry counts as a miss in both directions.
    """
    size, samples = task.metadata["pool"], task.samples
    # zero vectors stand in for missing embeddings; `valid` removes their hits
    width = next((len(record["image"]) for record in records.values() if "image" in record), 1)
    missing = {"image": [0.0] * width, "caption": [0.0] * width}
    found: dict[str, list[float]] = {}
    for start in range(0, len(samples), size):
        # all pools have the same size: recall depends on it
        first = min(start, len(samples) - size)
        pool = samples[first : first + size]
        embeds = [records.get(s.index, {}) for s in pool]
        valid = np.array(["image" in record for record in embeds], float)
        embeds = [record if "image" in record else missing for record in embeds]
        images, captions = (np.array([record[key] for record in embeds]) for key in ("image", "caption"))
        names = [s.prompt for s in pool]
        # recall at 5 of five candidates or fewer is always 1
        for k in (1, 5) if size > 5 else (1,):
            for direction, hits in (
                ("image_to_text", retrieval_hits(images, captions, names, k)),
                ("text_to_image", retrieval_hits(captions, images, names, k)),
            ):
                # a pair without image misses in both directions
                found.setdefault(f"{direction}/R@{k}", []).extend((hits * valid)[start - first :])
    metrics = {
        name: Metric(float(np.mean(values)), len(values), bootstrap(mean_columns(np.array(values))))
        for name, values in found.items()
    }
    per_sample = [
        {"index": s.index, "image": str(s.image), "truth": s.prompt, "score": float(hit)}
        for s, hit in zip(samples, found["image_to_text/R@1"])
    ]
    return Scored(metrics, {"chance": 1 / size}, per_sample)
