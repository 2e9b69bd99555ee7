"""K-means, the start of moving-average codebooks: by cosine (VQ-KD, arXiv 2411.04406) and by distance
(GaussianToken, 2501.15619).

R latents, V entries, C width of one code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import SIMILARITY_BLOCK


def kmeans(features: Tensor, rows: Tensor, indices: Tensor, iterations: int = 10) -> Tensor:
    """(V, C) unit rows after `iterations` rounds on (R, C) features; features without V rows keep the rest.

    Each round assigns every feature to its nearest row and replaces rows by the unit mean of their members;
    rows without members stay. With fewer features than rows the first R rows become the features, and there
    are no rounds.

    Args:
        rows: (V, C) before the start.
        indices: (V,) the distinct features to begin with.
    """
    features, rows = F.normalize(features.float(), dim=-1), F.normalize(rows.float(), dim=-1)
    if len(features) < len(rows):
        return torch.cat([features, rows[len(features) :]])
    rows = features[indices]
    for _ in range(iterations):
        codes = nearest_by_cosine(features, rows)
        rows = F.normalize(torch.where(*members_mean(features, codes, rows)), dim=-1)
    return rows


def kmeans_by_distance(features: Tensor, indices: Tensor, iterations: int = 10) -> tuple[Tensor, Tensor]:
    """(V, C) means after `iterations` rounds of Euclidean k-means on (R, C) features, and (V,) members in the
    last round; rows without members stay.

    Args:
        indices: (V,) the distinct features to begin with.
    """
    features = features.float()
    rows, counts = features[indices], torch.ones_like(features[indices, 0])
    step = max(SIMILARITY_BLOCK // len(rows), 1)
    for _ in range(iterations):
        half_norms = rows.square().sum(dim=-1) / 2
        blocks = [(block @ rows.T - half_norms).argmax(dim=-1) for block in features.split(step)]
        codes = torch.cat(blocks)
        rows = torch.where(*members_mean(features, codes, rows))
        counts = torch.bincount(codes, minlength=len(rows)).to(rows)
    return rows, counts


def nearest_by_cosine(features: Tensor, rows: Tensor) -> Tensor:
    """(R, C), (V, C) of unit norm -> (R,) codes, the first among equals, block by block."""
    step = max(SIMILARITY_BLOCK // len(rows), 1)
    return torch.cat([(block @ rows.T).argmax(dim=-1) for block in features.split(step)])


def members_mean(features: Tensor, codes: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(V, 1) whether a row has members, (V, C) their mean, and the rows: the arguments of torch.where."""
    sums = torch.zeros_like(rows).index_add_(0, codes, features)
    counts = torch.bincount(codes, minlength=len(rows))[:, None]
    return counts > 0, sums / counts.clamp(min=1), rows
