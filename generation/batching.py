"""Batches of prompts with images: left padding, image codes, and prefixes that several prompts share.

B prompts, L longest prompt, I images of a batch, N visual tokens per image, K sub-codebooks.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


def pad_left(rows: Sequence[Sequence[int]], model: Any) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, L) int64 on the model's device; all rows end together.

    The mask follows the lengths, not the ids: a pad id that is part of a prompt stays visible.
    """
    longest, pad = max(map(len, rows)), pad_id(model)
    ids = [[pad] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=model.device), torch.tensor(mask, device=model.device)


def pad_id(model: Any) -> int:
    """The padding id; the mask hides it, so any id of the vocabulary will do."""
    return model.config.pad_token_id or 0


def concat_codes(image_codes: Sequence[Tensor], model: Any) -> Tensor:
    """The images of several prompts, (n, N, K) each, as one tensor (I, N, K); I may be 0."""
    config = model.config
    images = [codes for codes in image_codes if len(codes)]
    empty = torch.zeros(0, config.num_image_tokens, config.num_codebooks, dtype=torch.long)
    return (torch.cat(images) if images else empty).to(model.device)


class SharedPrefix(NamedTuple):
    """The ids with which some prompts of a batch begin."""

    ids: list[int]
    codes: Tensor  # (n, N, K), the images of these prompts
    rows: list[int]  # the prompts


def find_shared_prefixes(
    prompts: Sequence[Sequence[int]], image_codes: Sequence[Tensor]
) -> list[SharedPrefix]:
    """Group prompts about the same images; each group's common prefix leaves every prompt its last id."""
    groups: dict[Any, list[int]] = {}
    for i, codes in enumerate(image_codes):
        groups.setdefault((tuple(codes.shape), codes.cpu().numpy().tobytes()), []).append(i)
    prefixes = []
    for rows in groups.values():
        first = list(prompts[rows[0]])
        length = min(len(prompts[i]) for i in rows) - 1
        for i in rows[1:]:
            differing = (j for j in range(length) if prompts[i][j] != first[j])
            length = next(differing, length)
        prefixes.append(SharedPrefix(first[:length], image_codes[rows[0]], rows))
    return prefixes


def can_share(model: Any, prompts: Sequence[Sequence[int]], prefixes: Sequence[SharedPrefix]) -> bool:
    """True if all images lie within the prefixes and every layer attends to its whole past.

    The padding between prefix and rest would shift a sliding window.
    """
    image_id = model.config.image_token_id
    if any(image_id in prompts[row][len(prefix.ids) :] for prefix in prefixes for row in prefix.rows):
        return False
    layer_types = getattr(model.config.text_config, "layer_types", None) or []
    return all(prefix.ids for prefix in prefixes) and all(kind == "full_attention" for kind in layer_types)


def split_batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """The items in batches of `size`, the last one shorter."""
    return (items[i : i + size] for i in range(0, len(items), size))
