"""The gradient path of IBQ and CODA: a softmax over the similarities to all rows, computed in blocks.

B batch, N visual tokens, K codebooks, V entries per codebook, A width of queries and keys, C width of a row.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .base import blocks_of_rows


class SoftmaxAssignment(NamedTuple):
    """Result of `assign_by_softmax`."""

    codes: Tensor  # (B, N, K), the largest similarity, the first among equals
    mean_rows: Tensor  # (B, N, K, C), the mean of the rows under the softmax
    entropy: Tensor  # mean entropy of the assignments minus entropy of their mean; 0 unless asked for


def assign_by_softmax(
    queries: Tensor,
    keys: Tensor,
    rows: Tensor,
    temperature: float | None,
    eps: float,
    average: Callable[[Tensor], Tensor] | None,
) -> SoftmaxAssignment:
    """Assign (B, N, K, A) queries to (K, V, A) keys with (K, V, C) rows.

    The rows are constants here: gradients reach queries and keys through the similarities alone. These are
    computed block by block, and again in the backward pass: as a whole they would take B*N*K*V floats several
    times over.

    Args:
        temperature: of the assignments whose entropy is computed; None = no entropy.
        eps: added in the logarithm of the mean assignment.
        average: the mean over processes; see `Quantizer.average_over_ranks`.
    """
    batch, length, books, _ = queries.shape
    count, entries, rows = batch * length, keys.shape[1], rows.detach()
    codes, soft, per_latent = [], [], queries.new_zeros(())
    means = [queries.new_zeros(entries) for _ in range(books)]  # mean assignment of each book
    for book, block in blocks_of_rows(queries, entries):
        found = checkpoint(_assign_block, block, keys[book], rows[book], temperature, use_reentrant=False)
        codes.append(found[0])
        soft.append(found[1])
        per_latent = per_latent + found[2] / (count * books)
        means[book] = means[book] + found[3] / count
    shape = (books, batch, length)
    ordered = torch.cat(codes).view(shape).permute(1, 2, 0).contiguous()
    mean_rows = torch.cat(soft).view(*shape, -1).permute(1, 2, 0, 3)
    if temperature is None:
        return SoftmaxAssignment(ordered, mean_rows, queries.new_zeros(()))
    mean = torch.stack(means)
    if average is not None:  # entropy is not linear: average before the logarithm
        mean = average(mean)
    of_mean = -(mean * torch.log(mean + eps)).sum(dim=-1).mean()
    return SoftmaxAssignment(ordered, mean_rows, per_latent - of_mean)


def _assign_block(
    queries: Tensor, keys: Tensor, rows: Tensor, temperature: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(R, A), (V, A), (V, C) -> codes (R,), mean rows (R, C), the summed entropy, summed assignments (V,)."""
    similarity = queries @ keys.T
    codes = similarity.argmax(dim=-1)
    soft = similarity.softmax(dim=-1) @ rows
    if temperature is None:
        return codes, soft, queries.new_zeros(()), queries.new_zeros(len(keys))
    logs = torch.log_softmax(similarity / temperature, dim=-1)
    probabilities = logs.exp()
    return codes, soft, -(probabilities * logs).sum(), probabilities.sum(dim=0)
