"""Bootstrap intervals of metrics that are ratios of sums over samples, resampling whole clusters.

M samples, G clusters (the questions about one image form a cluster), S sums. A metric is a function of the
column sums of an (M, S) array, so one resample is the product of cluster counts (G,) and cluster sums (G, S).
"""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np

from .benchmark import Record

RESAMPLES = 1000
Statistic = Callable[[np.ndarray], np.ndarray]


def bootstrap(
    columns: np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    statistic: Statistic | None = None,
    seed: int = 0,
) -> list[float] | None:
    """95 % percentile interval of `statistic` over resampled clusters; None with fewer than two clusters.

    Args:
        columns: (M, S) contribution of each sample to each sum.
        clusters: the cluster of each sample; None = every sample alone.
        statistic: (..., S) sums -> (...) value; None = `mean_statistic`.
    """
    values = _resampled(columns, clusters, statistic or mean_statistic, seed)
    if values is None:
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return [float(low), float(high)]


class Difference(NamedTuple):
    """B minus A, its 95 % interval, and the two-sided p-value of the null hypothesis "no difference"."""

    value: float
    interval: list[float] | None
    p: float | None


def paired_bootstrap(
    a: np.ndarray,
    b: np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    statistic: Statistic | None = None,
    seed: int = 0,
) -> Difference:
    """`statistic` of b minus that of a; both are (M, S) columns of the same samples."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    width, value_of = a.shape[1], statistic or mean_statistic

    def difference(sums: np.ndarray) -> np.ndarray:
        return value_of(sums[..., width:]) - value_of(sums[..., :width])

    # one set of resamples for both sides: their common noise cancels in the difference
    joined = np.concatenate([a, b], axis=1)
    value = float(difference(joined.sum(axis=0)))
    values = _resampled(joined, clusters, difference, seed)
    if values is None:
        return Difference(value, None, None)
    low, high = np.quantile(values, [0.025, 0.975])
    # p: twice the fraction of resamples on the other side of zero, and never 0
    beyond = min(int((values <= 0).sum()), int((values >= 0).sum()))
    return Difference(value, [float(low), float(high)], min(1.0, 2 * max(beyond, 1) / len(values)))


def _resampled(
    columns: np.ndarray, clusters: Sequence[Hashable] | None, statistic: Statistic, seed: int
) -> np.ndarray | None:
    """`statistic` of each resample, (RESAMPLES,); None with fewer than two clusters."""
    columns = np.asarray(columns, dtype=np.float64)
    if clusters is not None:
        numbers: dict[Hashable, int] = {}
        positions = np.array([numbers.setdefault(c, len(numbers)) for c in clusters], dtype=np.int64)
        # sum each cluster first: resampling then works on G rows instead of M
        totals = np.zeros((len(numbers), columns.shape[1]))
        np.add.at(totals, positions, columns)
        columns = totals
    groups = len(columns)
    if groups < 2:
        return None
    rng = np.random.default_rng(seed)  # fixed seed: results.json is reproducible
    values = []
    at_once = max(1, 4_000_000 // groups)  # bounds the memory of the index array for large sets
    for start in range(0, RESAMPLES, at_once):
        rounds = min(at_once, RESAMPLES - start)
        # cluster indices of row r are shifted by r * groups, so that one bincount counts all rounds
        sampled = rng.integers(groups, size=(rounds, groups)) + groups * np.arange(rounds)[:, None]
        weights = np.bincount(sampled.ravel(), minlength=rounds * groups).reshape(rounds, groups)
        values.append(statistic(weights.astype(np.float64) @ columns))
    return np.concatenate(values)


# ------------------------------------------------------------------- statistics: columns of samples -> value


def mean_columns(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """(M,) values -> (M, 2) columns, the value and 1, for `mean_statistic`."""
    values = np.asarray(values, dtype=np.float64)
    # a mean is a ratio of sums, so that resamples of unequal size are weighted correctly
    return np.stack([values, np.ones_like(values)], axis=1)


def mean_statistic(sums: np.ndarray) -> np.ndarray:
    """(..., 2) sums of value and of 1 -> their ratio."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1e-12)


def group_mean_columns(values: Sequence[float], groups: Sequence[Hashable]) -> np.ndarray:
    """(M,) values and their groups -> (M, 2 * g) columns for `group_mean_statistic`."""
    names = list(dict.fromkeys(groups))  # a dict keeps the order of first occurrence
    columns = np.zeros((len(values), len(names), 2))
    for i, (value, group) in enumerate(zip(values, groups)):
        columns[i, names.index(group)] = value, 1
    return columns.reshape(len(values), -1)


def group_mean_statistic(sums: np.ndarray) -> np.ndarray:
    """(..., 2 * g) sums of value and of 1 per group -> the mean over non-empty groups of their means."""
    value, count = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 2), -1, 0)
    # a group without samples in a resample is left out of the mean instead of counting as 0
    means = np.where(count > 0, value / np.maximum(count, 1e-12), 0.0)
    return means.sum(axis=-1) / np.maximum((count > 0).sum(axis=-1), 1)


def f1_columns(judged: Sequence[tuple[str, str, str]], categories: Sequence[str]) -> np.ndarray:
    """(parsed, label, category) of M yes/no answers -> (M, 3 * c) TP, FP, FN per category; POPE."""
    result = np.zeros((len(judged), len(categories), 3))
    for i, (parsed, label, category) in enumerate(judged):
        counts = (parsed == "yes" == label, parsed == "yes" != label, parsed != "yes" and label == "yes")
        result[i, categories.index(category)] = counts
    return result.reshape(len(judged), -1)


def f1_statistic(sums: np.ndarray) -> np.ndarray:
    """(..., 3 * c) sums of TP, FP, FN per category -> the mean F1 over categories."""
    # F1 = 2 TP / (2 TP + FP + FN)
    tp, fp, fn = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 3), -1, 0)
    return (2 * tp / np.maximum(2 * tp + fp + fn, 1e-12)).mean(axis=-1)


def question_pair_columns(records: Sequence[Record]) -> np.ndarray:
    """M records of two questions per image -> (M, 4 * t) columns for `question_pair_statistic`; MME.

    A record has "group" (the task), "score" and "pair" (1 if both questions about its image are right). The
    last two sums count images: each record of an image contributes an equal fraction of it.
    """
    names = list(dict.fromkeys(record["group"] for record in records))
    images: dict[tuple[str, str], int] = {}
    for record in records:
        key = record["group"], record["cluster"]
        images[key] = images.get(key, 0) + 1
    result = np.zeros((len(records), len(names), 4))
    for i, record in enumerate(records):
        # 1/2 for a complete pair
        part = 1 / images[record["group"], record["cluster"]]
        result[i, names.index(record["group"])] = record["score"], 1, record["pair"] * part, part
    return result.reshape(len(records), -1)


def question_pair_statistic(sums: np.ndarray) -> np.ndarray:
    """(..., 4 * t) sums -> the sum over tasks of 100 * (accuracy + accuracy+)."""
    right, count, both, images = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 4), -1, 0)
    parts = right / np.maximum(count, 1e-12) + both / np.maximum(images, 1e-12)
    return 100 * parts.sum(axis=-1)


class MainStatistic(NamedTuple):
    """How the main metric of a benchmark is computed from the records of `scores.jsonl`."""

    columns: Callable[[Sequence[Record]], np.ndarray]  # records -> (M, S)
    value: Statistic
    unit: str


def _pope_columns(records: Sequence[Record]) -> np.ndarray:
    names = list(dict.fromkeys(record["group"] for record in records))
    return f1_columns([(r["parsed"], r["truth"], r["group"]) for r in records], names)


# by `Scored.statistic`
STATISTICS = {
    "mean": MainStatistic(lambda rows: mean_columns([r["score"] for r in rows]), mean_statistic, "fraction"),
    "group mean": MainStatistic(
        lambda rows: group_mean_columns([r["score"] for r in rows], [r["group"] for r in rows]),
        group_mean_statistic,
        "fraction",
    ),
    "f1": MainStatistic(_pope_columns, f1_statistic, "fraction"),
    "question pairs": MainStatistic(question_pair_columns, question_pair_statistic, "points"),
}
