"""Answers to batches of prompts with images in them, left-padded so that all rows end together.

B prompts, L longest prompt, I images of a batch, N visual tokens per image, K sub-codebooks, D decoder width.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from open_unitok.errors import UserError

from .checks import check_whole
from .decoder import Decoder, context_length, pad_left
from .sampling import Sampling, check_seed, filter_logits


def answer_ids(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    image_codes: Sequence[Tensor],
    max_new_tokens: int = 32,
    batch_size: int = 128,
    seed: int | None = None,
    **options: Any,
) -> list[list[int]]:
    """The new ids of each prompt, without the end-of-sequence id.

    Args:
        model: a `UniTokForConditionalGeneration`.
        prompt_ids: lists of ids with placeholders where images stand.
        image_codes: one tensor (n, N, K) per prompt: the codes of its n images in their order; n may be 0.
        max_new_tokens: >= 1; an answer ends earlier at the end-of-sequence id.
        batch_size: prompts read together; prompts of like length share a batch.
        seed: of the draws, where options sample; None = the global generator of torch.
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
    if seed is not None:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(check_seed(seed))
            return answer_ids(model, prompt_ids, image_codes, max_new_tokens, batch_size, **options)
    answers: list[list[int]] = [[] for _ in prompt_ids]
    order = sorted(range(len(prompt_ids)), key=lambda i: -len(prompt_ids[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids, mask = pad_left([prompt_ids[i] for i in batch], pad_id(model), model.device)
        # no images are given as such: with image_codes, `generate` returns the new ids alone
        codes = join_codes([image_codes[i] for i in batch], model)
        new = model.generate(
            input_ids=ids,
            attention_mask=mask,
            image_codes=codes,
            max_new_tokens=max_new_tokens,
            **options,
        )
        for i, row in zip(batch, new.tolist()):
            answers[i] = until_end(row, ends)
    return answers


@torch.no_grad()
def answer_steps(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    image_codes: Sequence[Tensor],
    max_new_tokens: int = 32,
    seed: int | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Iterator[list[int | None]]:
    """Yield the next id of each prompt, None where its answer has ended, until all have.

    Else as `answer_ids`, whose greedy ids these are. Closing the iterator ends the work.

    Args:
        do_sample: draw with temperature, top_k and top_p; else take the likeliest.
    """
    check_answering(prompt_ids, max_new_tokens, 1, model.config)
    Sampling(1.0, temperature, top_k, top_p)  # refuses what is out of range
    if not prompt_ids:
        return
    generator = None if seed is None else torch.Generator(model.device).manual_seed(check_seed(seed))
    ids, mask = pad_left(prompt_ids, pad_id(model), model.device)
    embeds = model.embed_inputs(ids, join_codes(image_codes, model))
    decoder = Decoder(model.language_model, embeds, mask, torch.arange(len(ids)), room=max_new_tokens - 1)
    ends, going, hidden = end_ids(model), [True] * len(ids), decoder.hidden
    for left in reversed(range(max_new_tokens)):
        logits = model.text_logits(hidden).float()
        if do_sample:
            logits = filter_logits(logits / temperature, top_k, top_p)
            gumbel = torch.empty_like(logits).exponential_(generator=generator).log_().neg_()
            logits = logits + gumbel
        new = logits.argmax(dim=-1)
        rows = new.tolist()
        going = [on and row not in ends for on, row in zip(going, rows)]
        if not any(going):
            return
        yield [row if on else None for on, row in zip(going, rows)]
        if left:
            hidden = decoder.step(model.get_input_embeddings()(new).unsqueeze(1))


def join_codes(image_codes: Sequence[Tensor], model: Any) -> Tensor:
    """The images (I, N, K) of several prompts in their order; I may be 0."""
    config = model.config
    images = [codes for codes in image_codes if len(codes)]
    empty = torch.zeros(0, config.num_image_tokens, config.num_codebooks, dtype=torch.long)
    return (torch.cat(images) if images else empty).to(model.device)


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
