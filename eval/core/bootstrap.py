"""Bootstrap intervals of metrics that are ratios of sums over samples, resampling whole clusters.

M samples, G clusters (the questions of one image belong together), S sums.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
Statistic = Callable[[np.ndarray], np.ndarray]


def mean_statistic(sums: np.ndarray) -> np.ndarray:
    """(..., 2) sums of value and of 1 -> their ratio."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1e-12)


def f1_statistic(sums: np.ndarray) -> np.ndarray:
    """(..., 3 * c) sums of TP, FP, FN per category -> the mean F1 over categories."""
    tp, fp, fn = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 3), -1, 0)
    return (2 * tp / np.maximum(2 * tp + fp + fn, 1e-12)).mean(axis=-1)


def group_mean_statistic(sums: np.ndarray) -> np.ndarray:
    """(..., 2 * g) sums of value and of 1 per group -> the mean of the means of groups that are not empty."""
    value, count = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 2), -1, 0)
    means = np.where(count > 0, value / np.maximum(count, 1e-12), 0.0)
    return means.sum(axis=-1) / np.maximum((count > 0).sum(axis=-1), 1)


def bootstrap(
    columns: np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    statistic: Statistic = mean_statistic,
    seed: int = 0,
) -> list[float] | None:
    """The central 95 % of `statistic` over resampled clusters; None with fewer than two clusters.

    Args:
        columns: (M, S) what each sample adds to each sum.
        clusters: for each sample what it belongs to; None = every sample alone.
        statistic: (..., S) sums -> (...) value.
    """
    values = resampled(columns, clusters, statistic, seed)
    if values is None:
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return [float(low), float(high)]


class Difference(NamedTuple):
    """How much B is above A, its 95 % interval, and how likely so large a difference is by chance alone."""

    value: float
    interval: list[float] | None
    p: float | None


def paired_bootstrap(
    a: np.ndarray,
    b: np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    statistic: Statistic = mean_statistic,
    seed: int = 0,
) -> Difference:
    """`statistic` of b minus that of a, (M, S) each, of the same samples: every draw takes both alike.

    `p` is two-sided: twice the share of draws on the other side of zero, at least one draw.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    width = a.shape[1]

    def both(sums: np.ndarray) -> np.ndarray:
        return statistic(sums[..., width:]) - statistic(sums[..., :width])

    joined = np.concatenate([a, b], axis=1)
    value = float(both(joined.sum(axis=0)))
    values = resampled(joined, clusters, both, seed)
    if values is None:
        return Difference(value, None, None)
    low, high = np.quantile(values, [0.025, 0.975])
    beyond = min(int((values <= 0).sum()), int((values >= 0).sum()))
    return Difference(value, [float(low), float(high)], min(1.0, 2 * max(beyond, 1) / len(values)))


def resampled(
    columns: np.ndarray, clusters: Sequence[Hashable] | None, statistic: Statistic, seed: int
) -> np.ndarray | None:
    """`statistic` of each draw, (RESAMPLES,); None with fewer than two clusters."""
    columns = np.asarray(columns, dtype=np.float64)
    if clusters is not None:
        number: dict[Hashable, int] = {}
        place = np.array([number.setdefault(c, len(number)) for c in clusters], dtype=np.int64)
        totals = np.zeros((len(number), columns.shape[1]))
        np.add.at(totals, place, columns)
        columns = totals
    groups = len(columns)
    if groups < 2:
        return None
    rng = np.random.default_rng(seed)
    values = []
    at_once = max(1, 4_000_000 // groups)  # keeps the draws of large sets in memory
    for start in range(0, RESAMPLES, at_once):
        rounds = min(at_once, RESAMPLES - start)
        drawn = rng.integers(groups, size=(rounds, groups)) + groups * np.arange(rounds)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=rounds * groups).reshape(rounds, groups)
        values.append(statistic(weights.astype(np.float64) @ columns))
    return np.concatenate(values)


def mean_columns(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """(M,) values -> (M, 2) columns for `mean_of`."""
    values = np.asarray(values, dtype=np.float64)
    return np.stack([values, np.ones_like(values)], axis=1)


def group_mean_columns(values: Sequence[float], groups: Sequence[Hashable]) -> np.ndarray:
    """(M,) values and their groups -> (M, 2 * g) columns for `mean_of_groups`."""
    names = list(dict.fromkeys(groups))
    columns = np.zeros((len(values), len(names), 2))
    for i, (value, group) in enumerate(zip(values, groups)):
        columns[i, names.index(group)] = value, 1
    return columns.reshape(len(values), -1)
