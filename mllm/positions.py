"""Positions in padded and packed batches, found on the host before a batch goes to its device.

B batch, L sequence, I images in the batch, N visual tokens per image, S samples.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F

from open_unitok.core.errors import UserError

from .config import IGNORED
from .losses import Targets, find_targets

AnyTensor = TypeVar("AnyTensor", torch.Tensor, None, torch.Tensor | None)


def positions_from_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """(B, L) mask -> (B, L) positions that count each row's real tokens from 0; 0 on left padding."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


class SampleBounds(NamedTuple):
    """The samples of a flattened batch, in order; padding counts as samples of its own."""

    starts: torch.Tensor  # (S + 1,) int32: the cumulative lengths from 0
    lengths: list[int]  # (S,), on the host


class BatchPlan(NamedTuple):
    """What `UniTokForConditionalGeneration.forward` derives from its inputs; positions are in the flattened
    batch. Computed on the host, it spares a GPU's forward pass the waits for its own results."""

    images: torch.Tensor | None = None  # (I, N) of the images with codes
    features: torch.Tensor | None = None  # (J * M,) of the features of images that are read
    targets: Targets | None = None  # None without labels
    bounds: SampleBounds | None = None  # of packed or right-padded rows

    def to(self, device: torch.device | str) -> BatchPlan:
        """A copy on a device; host to GPU goes through pinned memory, without waiting."""
        bounds = self.bounds and SampleBounds(to_device(self.bounds.starts, device), self.bounds.lengths)
        targets = self.targets and Targets(
            to_device(self.targets.text_before, device),
            to_device(self.targets.text_ids, device),
            to_device(self.targets.images, device),
            to_device(self.targets.image_before, device),
        )
        return BatchPlan(to_device(self.images, device), to_device(self.features, device), targets, bounds)


def to_device(tensor: AnyTensor, device: torch.device | str) -> AnyTensor:
    """`tensor.to(device)`; from the host to a GPU through pinned memory, without waiting."""
    if tensor is None:
        return tensor
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def plan_batch(
    input_ids: torch.Tensor | None,
    labels: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    *,
    num_images: int,
    image_token_id: int,
    feature_token_id: int | None = None,
    sep_token_id: int | None = None,
) -> BatchPlan:
    """Find images, features, targets and samples of a batch; all (B, L), as in `forward`.

    Args:
        input_ids: None = vectors are given in their place.
        num_images: I.

    Raises:
        UserError: placeholders do not divide into the images; see also `find_targets` and
            `check_feature_targets`.
    """
    images = features = targets = bounds = None
    if input_ids is not None:
        images = find_placeholders(input_ids, num_images, image_token_id)
    if input_ids is not None and feature_token_id is not None:
        features = (input_ids == feature_token_id).flatten().nonzero().squeeze(1)
        if labels is not None:
            check_feature_targets(input_ids, labels, images, image_token_id, feature_token_id, sep_token_id)
    if labels is not None:
        targets = find_targets(labels, attention_mask, position_ids, images, image_token_id)
    if labels is not None or attention_mask is None:  # not for the padded prompts of generation
        bounds = find_bounds(attention_mask, position_ids)
    return BatchPlan(images, features, targets, bounds)


def find_placeholders(input_ids: torch.Tensor, num_images: int, image_token_id: int) -> torch.Tensor | None:
    """(I, N) positions of the images in the flattened batch; None without images.

    Raises:
        UserError: placeholders do not divide into the images.
    """
    positions = (input_ids == image_token_id).flatten().nonzero().squeeze(1)
    if not num_images:
        if len(positions):
            raise UserError(
                f"input_ids hold {len(positions)} image placeholders, but no image_codes were given."
            )
        return None
    if len(positions) % num_images:
        raise UserError(
            f"input_ids hold {len(positions)} image placeholders, but image_codes hold {num_images} images: "
            "expected one placeholder per visual token."
        )
    return positions.view(num_images, -1)


def find_bounds(
    attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
) -> SampleBounds | None:
    """The samples of rows that are packed (positions restart from 0 with each sample, no mask) or padded on
    the right (a mask of ones and then zeros); None for others."""
    if attention_mask is None and position_ids is not None:
        # transformers' rule: each padding token with position 0 becomes a sample of length 1
        changes = position_ids[:, 1:] != position_ids[:, :-1] + 1
    elif attention_mask is not None and attention_mask.dim() == 2:
        mask = attention_mask.bool()
        changes = mask[:, 1:] != mask[:, :-1]
        # padding on the left, or holes
        if not bool(mask[:, 0].all()) or bool((changes.sum(dim=1) > 1).any()):
            return None
    else:
        return None
    begins = F.pad(changes, (1, 0), value=True)  # a sample never spans rows
    starts = begins.flatten().nonzero().squeeze(1)
    bounds = torch.cat([starts, starts.new_full((1,), begins.numel())])
    return SampleBounds(bounds.to(torch.int32), bounds.diff().tolist())


def check_feature_targets(
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    images: torch.Tensor | None,
    image_token_id: int,
    feature_token_id: int,
    sep_token_id: int | None,
) -> None:
    """
    Raises:
        UserError: labels mark features, or an image that is generated has features behind its codes.
    """
    ids, targets = input_ids.flatten(), labels.flatten()
    is_feature = ids == feature_token_id
    if bool((targets[is_feature] != IGNORED).any()):
        raise UserError("labels mark feature placeholders: features are never targets, set them to -100.")
    if images is None:
        return
    last = images[:, -1]
    behind = torch.stack([(last + step).clamp(max=len(ids) - 1) for step in (1, 2)])
    is_read = is_feature[behind[0]]
    if sep_token_id is not None:
        is_read |= (ids[behind[0]] == sep_token_id) & is_feature[behind[1]]
    if bool((is_read & (targets[last] == image_token_id)).any()):
        raise UserError(
            "An image that is generated has features behind its codes: only images that are read have them."
        )
