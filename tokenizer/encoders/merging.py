"""Token merging: ToMe (arXiv 2210.09461), ToFu (2312.01026), density peaks (TCFormer; AiluRus, 2311.01197).

B batch, N tokens, M tokens that are left, D width, d width of the metric, r merged tokens. Each method is
one function that returns `assign` (B, N), the position of the token that stands for each token, and `kept`
(B, M), the positions of the tokens that are left, in their new order. `combine` and `unmerge` are the same
for all. The choice has no gradient and no randomness; equal scores go to the smaller position.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import exact_float32


def merge_schedule(r: int | Sequence[int], layers: int, slope: float = 0.0) -> list[int]:
    """Tokens to merge in each of `layers` blocks.

    Args:
        r: of every block, or of each of the first blocks (0 in the others).
        slope: in [-1, 1]; r grows linearly by it around its mean, from 2r to 0 at -1 (ToMe, appendix D).
    """
    if not isinstance(r, int):
        return [*r, *[0] * (layers - len(r))]
    low = int(r * (1 - slope))
    step = (2 * r - 2 * low) / max(layers - 1, 1)
    # one block has no slope
    return [int(low + step * i) for i in range(layers)] if layers > 1 else [r]


@torch.no_grad()
def match_pairs(
    metric: Tensor, r: int, protected: int = 0, order: Literal["raster", "published"] = "raster"
) -> tuple[Tensor, Tensor]:
    """ToMe's bipartite matching: the r best pairs of a token at an even and one at an odd position.

    Args:
        metric: (B, N, d), compared by cosine.
        r: merged tokens; at most half of those that are not protected.
        protected: the first tokens, which stay alone.
        order: of the tokens that are left: as before, or as in the published code (even ones by descending
            score, or by position if a token is protected; then the odd ones).

    Returns:
        assign, kept
    """
    metric = F.normalize(_exact(metric), dim=-1)  # the published division gives NaN for a zero key
    count, device = metric.shape[1], metric.device
    r = max(min(r, (count - protected) // 2), 0)
    with exact_float32(device):
        scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)  # (B, even, odd)
    scores[:, : (protected + 1) // 2] = -torch.inf
    scores[:, :, : protected // 2] = -torch.inf
    assign = torch.arange(count, device=device).repeat(len(metric), 1)
    if not r:
        return assign, assign.clone()
    best, partner = scores.max(dim=-1)  # the first of equals
    even = best.argsort(dim=-1, descending=True, stable=True)
    assign.scatter_(1, 2 * even[:, :r], 2 * partner.gather(1, even[:, :r]) + 1)
    if order == "raster":
        return assign, _kept(assign, count - r)
    alone = even[:, r:].sort(dim=-1).values if protected else even[:, r:]
    return assign, torch.cat([2 * alone, assign[:, 1::2]], dim=1)


@torch.no_grad()
def density_peaks(metric: Tensor, keep: int, k: int = 5, noise: Tensor | None = None) -> dict[str, Tensor]:
    """DPC-KNN as in TCFormer: dense tokens far from denser ones are anchors, the others join the nearest.

    Args:
        metric: (B, N, d), compared by Euclidean distance.
        keep: M anchors.
        k: nearest tokens, the token itself among them, whose squared distances give the density.
        noise: (B, N) in [0, 1); 1e-6 of it is added to the density, as published. None = no noise.

    Returns:
        assign, kept; rho, delta, score (B, N): density, distance to the nearest denser token, their product
    """
    distance = _distances(metric)
    rho = (-distance.square().topk(k, dim=-1, largest=False).values.mean(dim=-1)).exp()
    if noise is not None:
        rho = rho + noise.to(rho.dtype) * 1e-6
    reach = torch.where(_denser(rho), distance, torch.inf)
    return _join_anchors(distance, rho, reach, keep)


@torch.no_grad()
def spatial_density_peaks(
    metric: Tensor, grid: tuple[int, int], keep: int, k: int = 5, alpha: float = 0.3
) -> dict[str, Tensor]:
    """Density peaks among the k tokens nearest on the grid, AiluRus-style.

    Not verified against the publication, whose text and code were not at hand. From memory: distances times
    `alpha + (1 - alpha) * rank / k`. Decided here: ranks 1 to k by distance on the grid, without the token
    itself; a token without a denser neighbour is as far as any in the image; assignment by distance alone.

    Args:
        metric: (B, N, d) of a grid in raster order, compared by Euclidean distance.
        grid: (rows, columns).
        keep, k: as in `density_peaks`.
        alpha: scale of a neighbour of rank 0, in [0, 1].

    Returns:
        as `density_peaks`
    """
    distance = _distances(metric)
    neighbours = _neighbours(grid, k).to(metric.device).expand(len(metric), -1, -1)  # (B, N, k)
    rank = torch.arange(1, k + 1, dtype=distance.dtype, device=metric.device)
    scaled = distance.gather(2, neighbours) * (alpha + (1 - alpha) * rank / k)
    rho = (-scaled.mean(dim=-1)).exp()
    reach = torch.where(_denser(rho).gather(2, neighbours), scaled, torch.inf)
    return _join_anchors(distance, rho, reach, keep)


def combine(
    tokens: Tensor, size: Tensor, assign: Tensor, kept: Tensor, how: Literal["mean", "mlerp", "prune"]
) -> tuple[Tensor, Tensor]:
    """Merge tokens into those that stand for them.

    Args:
        tokens: (B, N, D).
        size: (B, N), tokens that each one stands for.
        assign, kept: from a method.
        how: the mean weighted by size; "mlerp", the mean scaled to the longest norm of its group (ToFu); or
            "prune", the token at `kept` as it is.

    Returns:
        (B, M, D) in the order of `kept`, and their sizes (B, M)
    """
    count = tokens.shape[1]
    alone = assign == torch.arange(count, device=assign.device)
    # The merged tokens, r = N - M in each image. Sums are products with one-hots (B, M, r): unlike those of
    # scatter_add they have one order on every device.
    sources = alone.to(torch.int8).argsort(dim=1, stable=True)[:, : count - kept.shape[1]]
    member = kept[:, :, None] == assign.gather(1, sources)[:, None]
    size = _exact(size)
    source_size, kept_size = size.gather(1, sources), size.gather(1, kept)
    new_size = kept_size + (member * source_size[:, None]).sum(dim=-1)
    own = _gather(tokens, kept)
    if how == "prune":
        return own, new_size
    exact, target = _exact(_gather(tokens, sources)), _exact(own)
    with exact_float32(tokens.device):
        total = member.to(exact.dtype) @ (exact * source_size[..., None])
    merged = (target * kept_size[..., None] + total) / new_size[..., None]
    if how == "mlerp":
        norms = torch.where(member, exact.norm(dim=-1)[:, None], 0.0)
        longest = torch.cat([target.norm(dim=-1)[..., None], norms], dim=-1).amax(dim=-1)
        merged = F.normalize(merged, dim=-1) * longest[..., None]
    # x * size / size may differ from x by rounding
    merged = torch.where(member.any(dim=-1)[..., None], merged, target)
    return merged.to(tokens.dtype), new_size


def unmerge(tokens: Tensor, assign: Tensor, kept: Tensor) -> Tensor:
    """(B, M, D) tokens at the positions `kept` -> (B, N, D): a copy for each token they stand for."""
    return _gather(tokens, index_of(assign, kept))


def index_of(assign: Tensor, kept: Tensor) -> Tensor:
    """(B, N): the index in `kept` of each token's representative."""
    places = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    return torch.zeros_like(assign).scatter(1, kept, places).gather(1, assign)


def _gather(tokens: Tensor, index: Tensor) -> Tensor:
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))


def _kept(assign: Tensor, count: int) -> Tensor:
    """(B, count): the positions of the tokens that stand for themselves, ascending."""
    merged = assign != torch.arange(assign.shape[1], device=assign.device)
    return merged.to(torch.int8).argsort(dim=1, stable=True)[:, :count]


def _exact(x: Tensor) -> Tensor:
    """float64 stays, all else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def _distances(metric: Tensor) -> Tensor:
    """(B, N, N): Euclidean distances / sqrt(d). The default of cdist is up to .008 off for equal tokens."""
    metric = _exact(metric)
    exact = torch.cdist(metric, metric, compute_mode="donot_use_mm_for_euclid_dist")
    return exact / metric.shape[-1] ** 0.5


def _denser(rho: Tensor) -> Tensor:
    """(B, N, N): whether token j (last) is denser than token i; of equals the first."""
    own, other = rho[:, :, None], rho[:, None]
    place = torch.arange(rho.shape[1], device=rho.device)
    return (other > own) | ((other == own) & (place[None] < place[:, None]))


def _neighbours(grid: tuple[int, int], k: int) -> Tensor:
    """(N, k): the tokens nearest to each on the grid, without itself; of equally near ones the first."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], dim=1)
    squared = (places[:, None] - places[None]).square().sum(dim=-1)
    squared.fill_diagonal_(-1)  # first, and dropped
    return squared.argsort(dim=-1, stable=True)[:, 1 : k + 1]


def _join_anchors(distance: Tensor, rho: Tensor, reach: Tensor, keep: int) -> dict[str, Tensor]:
    """Choose the anchors by density times distance to a denser token, and assign the others by distance.

    Args:
        distance: (B, N, N).
        rho: (B, N) densities.
        reach: (B, N, any), distances to denser tokens; infinite for others.
        keep: M anchors.
    """
    nearest = reach.amin(dim=-1)
    delta = torch.where(nearest.isinf(), distance.amax(dim=(1, 2))[:, None], nearest)
    score = rho * delta
    kept = score.argsort(dim=-1, descending=True, stable=True)[:, :keep].sort(dim=-1).values
    to_anchors = distance.gather(2, kept[:, None].expand(-1, distance.shape[1], -1))
    assign = kept.gather(1, to_anchors.argmin(dim=-1)).scatter(1, kept, kept)
    return {"assign": assign, "kept": kept, "rho": rho, "delta": delta, "score": score}
