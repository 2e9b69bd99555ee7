"""Answers to batches of prompts with images in them, left-padded so that all rows end together.

B prompts, L longest prompt, I images of a batch, N visual tokens per image, K sub-codebooks, D decoder width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from open_unitok.errors import UserError

from .drawing import context_length, pad_left


def answer_ids(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    image_codes: Sequence[Tensor],
    max_new_tokens: int = 32,
    batch_size: int = 128,
    **options: Any,
) -> list[list[int]]:
    """The new ids of each prompt, without the end-of-sequence id.

    Args:
        model: a `UniTokForConditionalGeneration`.
        prompt_ids: lists of ids with placeholders where images stand.
        image_codes: one tensor (n, N, K) per prompt: the codes of its n images in their order; n may be 0.
        max_new_tokens: >= 1; an answer ends earlier at the end-of-sequence id.
        batch_size: prompts read together; prompts of like length share a batch.
        options: of transformers' `generate` (do_sample, num_beams, temperature, ...); without any, greedy.

    Raises:
        UserError: an empty prompt, one that is too long, or a number out of range.
    """
    config = model.config
    check_answering(prompt_ids, max_new_tokens, batch_size, config)
    if options.get("num_return_sequences", 1) != 1:
        raise UserError("num_return_sequences must be 1: ask the question several times instead.")
    ends = end_ids(model)
    options = {"do_sample": False, "pad_token_id": pad_id(model), **options}
    answers: list[list[int]] = [[] for _ in prompt_ids]
    order = sorted(range(len(prompt_ids)), key=lambda i: -len(prompt_ids[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids, mask = pad_left([prompt_ids[i] for i in batch], pad_id(model), model.device)
        images = [image_codes[i] for i in batch if len(image_codes[i])]
        # no images are given as such: with image_codes, `generate` returns the new ids alone
        codes = (
            torch.cat(images) if images else ids.new_zeros(0, config.num_image_tokens, config.num_codebooks)
        )
        new = model.generate(
            input_ids=ids,
            attention_mask=mask,
            image_codes=codes.to(model.device),
            max_new_tokens=max_new_tokens,
            **options,
        )
        for i, row in zip(batch, new.tolist()):
            answers[i] = until_end(row, ends)
    return answers


def end_ids(model: Any) -> set[int]:
    """The ids at which an answer ends."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = model.config.eos_token_id if ends is None else ends
    return set() if ends is None else set(ends) if isinstance(ends, (list, tuple)) else {ends}


def pad_id(model: Any) -> int:
    """What fills rows up; the mask hides it, so any id of the vocabulary would do."""
    return model.config.pad_token_id or 0


def until_end(row: Sequence[int], ends: set[int]) -> list[int]:
    """The ids before the first end."""
    return list(row[: next((i for i, x in enumerate(row) if x in ends), len(row))])


def check_answering(
    prompt_ids: Sequence[Sequence[int]], max_new_tokens: Any, batch_size: Any, config: Any
) -> None:
    """
    Raises:
        UserError: see `answer_ids`.
    """
    check_whole("max_new_tokens", max_new_tokens)
    check_whole("batch_size", batch_size)
    limit = context_length(config)
    for i, row in enumerate(prompt_ids):
        if not len(row):
            raise UserError(f"Question {i} is empty.")
        if limit is not None and len(row) + max_new_tokens > limit:
            raise UserError(
                f"Question {i} has {len(row)} tokens, images included; with {max_new_tokens} new ones "
                f"more than the context of {limit}: shorten the question or lower max_new_tokens."
            )


def check_whole(name: str, value: Any) -> None:
    """
    Raises:
        UserError: `value` is no whole number >= 1.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} is {value!r}; it must be a whole number >= 1.")
