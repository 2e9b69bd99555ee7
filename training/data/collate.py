"""Collate samples into the rows of a micro-batch: padding, masks, packing (arXiv 2502.20321, section 3.4).

Rows are padded on the right. Padding is derived from lengths, never from the pad id, which is also a real
token. Packing puts several samples into one row; position ids restart at 0 to keep them apart.

B rows, L sequence length, I images in a batch, N visual tokens per image, K sub-codebooks.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from open_unitok.mllm.positions import BatchPlan, plan_batch

from .sample_kinds import IGNORE_INDEX, SAMPLE_KINDS
from .sequences import TokenSequence
from .tar_index import BadSample


class TrainingSample(NamedTuple):
    """A sequence with its images in the order of their placeholders."""

    kind: str
    sequence: TokenSequence
    images: tuple[np.ndarray, ...]  # codes, each (N, K)
    features: tuple[np.ndarray, ...] = ()  # each (M, F), or the codes (N, K) that they follow from


class Batch(NamedTuple):
    """One micro-batch: the model's inputs, and counts."""

    # input_ids, labels, attention_mask (B, L), or, packed, position_ids (B, L); image_codes (I, N, K) or
    # None; image_features (J, M, F), or feature_codes (J, N, K), if the images of a sample have features
    inputs: dict[str, torch.Tensor | None]
    kinds: torch.Tensor  # (B, L) indices of SAMPLE_KINDS
    text_targets: int  # text labels left after the shift by one
    code_targets: int  # codes that are learned: K per placeholder of a generated image
    tokens: int  # tokens that are not padding
    attention_pairs: int  # causal attention pairs: each token with itself and those before it in its sample
    plan: BatchPlan  # what the model would derive from the inputs


def collate(
    samples: Sequence[TrainingSample] | Sequence[Sequence[TrainingSample]],
    image_token_id: int,
    pad_id: int,
    pack_to: int = 0,
    feature_token_id: int | None = None,
    sep_token_id: int | None = None,
) -> Batch:
    """Join samples of any kinds and any numbers of images into one micro-batch.

    Args:
        samples: or those of each row.
        pack_to: 0 = one sample per row; else rows of this length (or of the longest sample's) hold as many
            samples as fit.
        feature_token_id, sep_token_id: of a model with features.

    Raises:
        BadSample: images of different numbers of visual tokens, which do not stack into one tensor.
    """
    samples, packed = _rows_of(samples, pack_to)
    lengths = [len(sample.sequence.ids) for sample in samples]
    shape = (len(packed), max(sum(lengths[i] for i in row) for row in packed))
    ids, labels = np.full(shape, pad_id, dtype=np.int64), np.full(shape, IGNORE_INDEX, dtype=np.int64)
    positions, kinds = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    kind_numbers = {kind: number for number, kind in enumerate(SAMPLE_KINDS)}
    first_labels = 0  # labels that the shift drops: the first of each sample
    for number, row in enumerate(packed):
        start = 0
        for i in row:
            span = (number, slice(start, start + lengths[i]))
            ids[span], labels[span] = samples[i].sequence
            positions[span], kinds[span] = np.arange(lengths[i]), kind_numbers[samples[i].kind]
            mask[span] = 1
            first_labels += int(samples[i].sequence.labels[0] != IGNORE_INDEX)
            start += lengths[i]
        # padding counts as one more packed sample, so that no real token attends to it
        positions[number, start:] = np.arange(shape[1] - start)
    # in the order of the packed rows: the model scatters images over placeholders in row-major order
    images = _stack([codes for row in packed for i in row for codes in samples[i].images])
    features = _stack([array for row in packed for i in row for array in samples[i].features])
    # placeholders of generated images: K codes each instead of a text label
    generated = labels == image_token_id
    # the model separates packed samples by their position ids, so packed rows have no mask
    inputs = {
        "input_ids": ids,
        "labels": labels,
        **({"position_ids": positions} if pack_to else {"attention_mask": mask}),
    }
    tensors: dict[str, torch.Tensor | None] = {n: torch.from_numpy(array) for n, array in inputs.items()}
    tensors["image_codes"] = None if images is None else torch.from_numpy(images.astype(np.int64))
    if features is not None and features.dtype.kind == "u":
        tensors["feature_codes"] = torch.from_numpy(features.astype(np.int64))
    elif features is not None:
        tensors["image_features"] = torch.from_numpy(features)
    plan = plan_batch(
        *(tensors[name] for name in ("input_ids", "labels")),
        attention_mask=tensors.get("attention_mask"),
        position_ids=tensors.get("position_ids"),
        num_images=0 if images is None else len(images),
        image_token_id=image_token_id,
        feature_token_id=feature_token_id,
        sep_token_id=sep_token_id,
    )
    return Batch(
        inputs=tensors,
        kinds=torch.from_numpy(kinds),
        text_targets=int(((labels != IGNORE_INDEX) & ~generated).sum()) - first_labels,
        code_targets=int(generated.sum()) * (0 if images is None else images.shape[2]),
        tokens=sum(lengths),
        attention_pairs=sum(length * (length + 1) // 2 for length in lengths),
        plan=plan,
    )


def _rows_of(
    samples: Sequence[TrainingSample] | Sequence[Sequence[TrainingSample]], pack_to: int
) -> tuple[list[TrainingSample], list[list[int]]]:
    """All samples, and the indices of each row's."""
    if isinstance(samples[0], TrainingSample):
        flat: list[TrainingSample] = list(samples)  # pyright: ignore
        lengths = [len(sample.sequence.ids) for sample in flat]
        return flat, pack_rows(lengths, max(pack_to, *lengths)) if pack_to else [
            [i] for i in range(len(flat))
        ]
    flat = [sample for row in samples for sample in row]  # pyright: ignore
    ends = list(itertools.accumulate(len(row) for row in samples))
    return flat, [list(range(end - len(row), end)) for row, end in zip(samples, ends)]


def _stack(images: list[np.ndarray]) -> np.ndarray | None:
    if len({array.shape for array in images}) > 1:
        raise BadSample("a batch holds images of different sizes")
    return np.stack(images) if images else None


def pack_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Group samples into rows of `capacity` tokens by best-fit decreasing: the longest first, each into the
    fullest row that still holds it. Returns the indices of each row's samples."""
    rows: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [row for row, space in enumerate(free) if space >= lengths[i]]
        if not fitting:
            rows.append([])
            free.append(capacity)
            fitting = [len(rows) - 1]
        row = min(fitting, key=lambda row: free[row])
        rows[row].append(i)
        free[row] -= lengths[i]
    return rows
