"""Targets and losses of text and images (arXiv 2502.20321, section 3.4; z-loss as published).

B batch, L sequence, I images in the batch, J target images, N visual tokens per image, K sub-codebooks,
V entries per sub-codebook, T target text tokens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from open_unitok.core.errors import UserError

from .config import IGNORED


class Targets(NamedTuple):
    """Positions in the flattened batch; a token is predicted at the position before it."""

    text_before: torch.Tensor  # (T,)
    text_ids: torch.Tensor  # (T,)
    images: torch.Tensor | None  # (J,) indices of the target images among the I images; None = none
    image_before: torch.Tensor | None  # (J, N)


def find_targets(
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    positions: torch.Tensor | None,
    image_token_id: int,
) -> Targets:
    """Find the text and image targets of a batch.

    Args:
        labels: (B, L) text ids, `image_token_id` or -100.
        attention_mask: (B, L) or None. position_ids: (B, L) or None, 0 at the start of each packed sample.
        positions: (I, N) of the images in the flattened batch, or None.

    Raises:
        UserError: labels mark part of an image, or an image with no token before it.
    """
    # logits at position i predict the token at i + 1
    first = first_tokens(labels, attention_mask, position_ids).flatten()
    flat = labels.flatten()
    is_target = (flat != IGNORED) & ~first
    text = (is_target & (flat != image_token_id)).nonzero().squeeze(1)
    images = image_before = None
    if positions is not None:
        # an image is a target as a whole or not at all: the depth head is trained on (J, N) tokens
        marked = flat[positions] == image_token_id  # (I, N)
        images = marked.any(dim=1).nonzero().squeeze(1)
        if not bool(marked[images].all()):
            raise UserError("labels mark only part of an image: mark all its placeholders, or none.")
        if len(images):
            if bool(first[positions[images, 0]].any()):
                raise UserError(
                    "An image is the first token of its sample and cannot be a target: put a token before it."
                )
            image_before = positions[images] - 1
        else:
            images = None
    return Targets(text - 1, flat[text], images, image_before)


def first_tokens(
    labels: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
) -> torch.Tensor:
    """(B, L) bool: padding, and tokens with no real token before them, which cannot be predicted."""
    first = torch.zeros_like(labels, dtype=torch.bool)
    first[:, 0] = True
    if attention_mask is not None and attention_mask.dim() == 2:
        mask = attention_mask[:, -labels.shape[1] :].bool()
        first[:, 1:] |= ~mask[:, :-1]  # after left padding
        first |= ~mask  # padding itself
    elif position_ids is not None:  # packed rows: positions restart from 0 with each sample
        first |= position_ids == 0
    return first


def text_loss(
    logits: torch.Tensor, ids: torch.Tensor, z_weight: float = 0.0, keep_logits: bool = True
) -> torch.Tensor:
    """(T, vocabulary) logits and (T,) ids -> summed cross entropy, plus z-loss (squared log-sum-exp).

    Args:
        keep_logits: as in `sum_in_chunks`.
    """

    def loss(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = logits.float()
        entropy = F.cross_entropy(logits, ids, reduction="sum")
        return (entropy + z_weight * logits.logsumexp(dim=-1).square().sum() if z_weight else entropy,)

    return sum_in_chunks(loss, logits, ids, keep_logits)[0]


def image_loss(
    logits: torch.Tensor, codes: torch.Tensor, z_weight: float, keep_logits: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(M, K, V) logits and (M, K) codes -> summed cross entropy plus z-loss, the z-loss alone, and the number
    of correct argmax predictions per sub-codebook (K,).

    The published z-loss squares the largest logit, not the log-sum-exp.

    Args:
        keep_logits: as in `sum_in_chunks`.
    """

    def loss(logits: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = logits.float()
        largest, predicted = logits.max(dim=-1)
        z_loss = z_weight * largest.square().sum()
        entropy = F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="sum")
        return entropy + z_loss, z_loss.detach(), (predicted == codes).sum(dim=0)

    total, z_loss, correct = sum_in_chunks(loss, logits, codes, keep_logits)
    return total, z_loss, correct


WHOLE_LOGITS = 2**24  # up to 64 MiB in float32 are not cut into chunks
CHUNK_LOGITS = 2**22


def sum_in_chunks(
    loss: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]],
    logits: torch.Tensor,
    targets: torch.Tensor,
    keep_logits: bool = True,
) -> tuple[torch.Tensor, ...]:
    """`loss(logits, targets)`, a tuple of sums over rows; many logits are taken in chunks of rows.

    A loss in float32 takes about four times the memory of its float32 logits; chunks take it one after the
    other. The gradient of a chunk follows its loss at once, so that no chunk is computed twice.

    Args:
        logits: (rows, ...). targets: (rows, ...).
        keep_logits: False = the caller does not read `logits` again: their memory is reused for their
            gradient, wherever one is taken.

    Returns:
        The sums; only the first has a gradient, which can be taken once.
    """
    if logits.numel() <= WHOLE_LOGITS:
        return loss(logits, targets)
    return _SumInChunks.apply(loss, logits, targets, keep_logits)


class _SumInChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loss: Callable[..., Any], logits: torch.Tensor, targets: torch.Tensor, keep_logits: bool
    ) -> tuple[torch.Tensor, ...]:
        rows = max(CHUNK_LOGITS // logits[0].numel(), 1)
        gradient = None
        if ctx.needs_input_grad[1]:
            gradient = torch.empty_like(logits) if keep_logits else logits.detach()
        sums: list[torch.Tensor] = []
        for start in range(0, len(logits), rows):
            span = slice(start, start + rows)
            chunk = logits[span].detach().requires_grad_(gradient is not None)
            with torch.set_grad_enabled(gradient is not None):
                parts = loss(chunk, targets[span])
            if gradient is not None:
                # the logits of this chunk are not needed any more
                gradient[span] = torch.autograd.grad(parts[0], chunk)[0]
            values = [part.detach() for part in parts]
            sums = [total + value for total, value in zip(sums, values)] if sums else values
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(*sums[1:])
        return tuple(sums)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[None, torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        # in place: a second backward pass raises autograd's error about a changed tensor
        return None, gradient.mul_(upstream[0]), None, None


def divide_losses(found: dict[str, Any], count: torch.Tensor | int) -> None:
    """Divide all losses of an output by `count`; under DataParallel it has one equal entry per GPU."""
    divisor = torch.as_tensor(count).flatten()[0].clamp(min=1)
    for name in ("loss", "text_loss", "image_loss", "image_z_loss"):
        found[name] = found[name] / divisor.to(found[name].device)
