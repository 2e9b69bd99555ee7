"""Zero-shot classification by the CLIP branch: prompts per class -> classifier -> top-1 and top-5.

B images, C classes, E embedding width.
"""

import functools
import importlib.resources
import itertools
import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from open_unitok.core.errors import UserError

SCALE = 100.0  # the published evaluation's logits are 100 * image @ classifier


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
