"""FID, Inception Score, KID, precision and recall in float64, from the features of `inception`.

N and M images, D features, C classes.
"""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.special

from open_unitok.core.errors import UserError


class Moments(NamedTuple):
    """Mean (D,) and unbiased covariance (D, D) of the features of n images."""

    mean: np.ndarray
    covariance: np.ndarray
    n: int


def compute_moments(batches: Iterable[np.ndarray]) -> Moments:
    """Moments of feature batches (B, D) in one pass, without keeping the batches.

    Raises:
        UserError: fewer than two images, or non-finite features.
    """
    n, total, products, origin = 0, np.zeros(()), np.zeros(()), np.zeros(())
    for batch in batches:
        batch = np.asarray(batch, np.float64)
        if not np.isfinite(batch).all():
            raise UserError("Features hold NaN or infinity; check the images and the Inception weights.")
        if n == 0:
            # sums about a typical value avoid cancellation in E[xy] - E[x]E[y]
            origin = batch.mean(axis=0)
            total, products = np.zeros_like(origin), np.zeros((len(origin), len(origin)))
        centred = batch - origin
        n, total, products = n + len(batch), total + centred.sum(axis=0), products + centred.T @ centred
    if n < 2:
        raise UserError(f"FID needs at least two images on either side, got {n}.")
    # (sum xy - n mean mean) / (n - 1) about the origin, as np.cov and all FID packages
    shift = total / n
    return Moments(origin + shift, (products - n * np.outer(shift, shift)) / (n - 1), n)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^1/2) (arXiv 1706.08500), clipped at 0."""
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"FID statistics have {a.mean.size} and {b.mean.size} features; use those of one layer."
        )
    # tr((S1 S2)^1/2) = tr((R S2 R)^1/2) with R = S1^1/2. R S2 R is symmetric, so singular covariances (fewer
    # images than features) need no epsilon on the diagonal, unlike scipy.linalg.sqrtm of S1 S2.
    values, vectors = scipy.linalg.eigh(a.covariance)
    # clip: round-off makes zero eigenvalues slightly negative
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    # symmetrise: eigvalsh reads one triangle only
    inner = root @ b.covariance @ root
    overlap = np.sqrt(scipy.linalg.eigvalsh((inner + inner.T) / 2).clip(0)).sum()
    distance = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance)
    return max(float(distance - 2 * overlap), 0.0)


def inception_score(logits: np.ndarray, splits: int = 10, shuffle: bool = True) -> tuple[float, float]:
    """torch-fidelity's score: (N, C) logits without bias -> mean and population std over splits."""
    n = len(logits)
    if n < splits:
        raise UserError(f"The Inception Score in {splits} splits needs at least {splits} images, got {n}.")
    # 2020: the seed of torch-fidelity
    order = np.random.RandomState(2020).permutation(n) if shuffle else np.arange(n)
    # splits differ by at most one image if n is not a multiple
    bounds = [i * n // splits for i in range(splits + 1)]
    scores = [_block_score(logits[order[a:b]]) for a, b in itertools.pairwise(bounds)]
    return float(np.mean(scores)), float(np.std(scores))


def inception_score_adm(logits: np.ndarray, block: int = 5000) -> float:
    """ADM's Inception Score: the mean over consecutive blocks, including a shorter last one."""
    return float(np.mean([_block_score(logits[i : i + block]) for i in range(0, len(logits), block)]))


def _block_score(logits: np.ndarray) -> float:
    """exp(E[KL(p(y|x) || p(y))]) over one block of logits."""
    # float64: sums over 1008 classes lose digits in float32
    logs = scipy.special.log_softmax(np.asarray(logits, np.float64), axis=1)
    probabilities = np.exp(logs)
    # the marginal p(y)
    mean = probabilities.mean(axis=0)
    return float(np.exp((probabilities * (logs - np.log(mean.clip(1e-300)))).sum(axis=1).mean()))


def squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3 (arXiv 1801.01401)."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    n, m, d = len(x), len(y), x.shape[1]
    xx, yy, xy = ((p @ q.T / d + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
    # unbiased: exclude pairs of an image with itself
    within = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return float(within - 2 * xy.mean())


def kid(x: np.ndarray, y: np.ndarray, subsets: int = 100, size: int = 1000) -> tuple[float, float]:
    """Mean and population std of `squared_mmd` over random subsets.

    Raises:
        UserError: a subset is larger than a set of images.
    """
    if size > min(len(x), len(y)):
        raise UserError(
            f"KID with subsets of {size} needs as many images on either side, got {len(x)} and {len(y)}."
        )
    # seed and order of subsets of torch-fidelity, so that values agree exactly
    random = np.random.RandomState(2020)
    values = []
    for _ in range(subsets):
        first = x[random.choice(len(x), size, replace=False)]
        values.append(squared_mmd(first, y[random.choice(len(y), size, replace=False)]))
    return float(np.mean(values)), float(np.std(values))


class PrecisionRecall(NamedTuple):
    """Fraction of samples in the reference manifold, and of references in the sample manifold."""

    precision: float
    recall: float


def precision_recall(
    reference: np.ndarray, samples: np.ndarray, k: int = 3, rows: int = 1000
) -> PrecisionRecall:
    """Precision and recall: the means of `manifold_membership`."""
    precision, recall = manifold_membership(reference, samples, k, rows)
    return PrecisionRecall(float(precision.mean()), float(recall.mean()))


def manifold_membership(
    reference: np.ndarray, samples: np.ndarray, k: int = 3, rows: int = 1000
) -> tuple[np.ndarray, np.ndarray]:
    """Masks of samples (M,) in the reference manifold and of references (N,) in the sample manifold.

    A manifold is the union of balls around the points of a set, with the distance to the k-th neighbour as
    radius (arXiv 1904.06991).
    ADM's evaluator computes distances in float16, so single images may differ.

    Args:
        reference: (N, D), samples: (M, D); more than k of each.
        rows: rows of the distance matrix held in memory at a time.
    """
    if min(len(reference), len(samples)) <= k:
        raise UserError(
            f"Precision and recall with k = {k} need more than {k} images on either side, "
            f"got {len(reference)} and {len(samples)}."
        )
    reference, samples = np.asarray(reference, np.float64), np.asarray(samples, np.float64)
    # radius: the distance to the k-th neighbour in the same set
    radii_r, radii_s = _squared_radii(reference, k, rows), _squared_radii(samples, k, rows)
    inside_r, inside_s = np.zeros(len(samples), bool), np.zeros(len(reference), bool)
    # blocks of rows: the distance matrix of 50,000 images would take 20 GB
    for start in range(0, len(samples), rows):
        squares = _squared_distances(samples[start : start + rows], reference)
        inside_r[start : start + rows] = (squares <= radii_r).any(axis=1)
        inside_s |= (squares <= radii_s[start : start + rows, None]).any(axis=0)
    return inside_r, inside_s


def _squared_radii(x: np.ndarray, k: int, rows: int) -> np.ndarray:
    """(N,) squared distance of each point to its k-th neighbour other than itself."""
    parts = []
    for start in range(0, len(x), rows):
        squares = _squared_distances(x[start : start + rows], x)
        squares[
            np.arange(len(squares)), np.arange(start, start + len(squares))
        ] = -1.0  # the point itself is never a neighbour
        # partition finds the k-th smallest without sorting a row
        parts.append(np.partition(squares, k, axis=1)[:, k])
    return np.concatenate(parts)


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N, M) squared distances of (N, D) and (M, D)."""
    # |a - b|^2 = |a|^2 + |b|^2 - 2ab; round-off may push it below 0
    return ((a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T).clip(0)
