"""Text generation for batches of prompts with images, left-padded so that all rows end together.

B prompts, L longest prompt, I images of a batch, N visual tokens per image, K sub-codebooks, D decoder width.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from open_unitok.core.errors import UserError
from open_unitok.mllm.features import ReadImages
from open_unitok.mllm.loading import check_logits

from .backends import choose_backend
from .backends.cuda_text import iter_captured_text_ids
from .backends.native_text import iter_native_text_ids
from .backends.text_samplers import GreedySampler, GumbelSampler, sampler_of
from .kv_cache import (
    SharedPrefix,
    join_images,
    pad_id,
    pad_left,
    prefill_prefixes,
    prefill_text,
    shared_prefixes,
)
from .sampling import Sampling, check_seed
from .validation import check_questions, check_text_options

# of transformers' `generate`, which act on the logits of new ids alone
_PREFIX_OPTIONS = {
    "do_sample", "temperature", "top_k", "top_p", "min_p", "num_beams", "length_penalty", "early_stopping",
}  # fmt: skip


def generate_text_ids(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    images: Sequence[Tensor | ReadImages],
    max_new_tokens: int = 32,
    batch_size: int = 128,
    seed: int | None = None,
    share_prefix: bool = True,
    backend: str = "auto",
    **options: Any,
) -> list[list[int]]:
    """Generate the new ids of each prompt, without the end-of-sequence id.

    Args:
        model: a `UniTokForConditionalGeneration`.
        prompt_ids: lists of ids with all placeholder ids of each image.
        images: per prompt the codes (n, N, K) of its n images in order, or `ReadImages`; n may be 0.
        max_new_tokens: >= 1; an answer ends earlier at the end-of-sequence id.
        batch_size: prompts per batch; prompts of similar length share a batch.
        seed: for options that sample; None = torch's global generator.
        share_prefix: prefill the common prefix of prompts about the same images once per batch.
        backend: see `choose_backend`.
        options: of transformers' `generate` (do_sample, num_beams, temperature, ...); none = greedy.

    Raises:
        UserError: a prompt is empty or too long, or a number is out of range.
    """
    check_questions(prompt_ids, max_new_tokens, batch_size, model.config)
    check_text_options(options)
    if seed is not None:
        # transformers samples from the global generator: seed it, then restore the caller's state
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(check_seed(seed))
            return generate_text_ids(
                model,
                prompt_ids,
                images,
                max_new_tokens,
                batch_size,
                None,
                share_prefix,
                backend,
                **options,
            )
    answers: list[list[int]] = [[] for _ in prompt_ids]
    # longest first: little padding per batch, and running out of memory shows in the first batch
    order = sorted(range(len(prompt_ids)), key=lambda i: -len(prompt_ids[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        prompts, own = [prompt_ids[i] for i in batch], [images[i] for i in batch]
        chosen = choose_backend(model, backend, num_steps=max_new_tokens - 1, text_options=options)
        iter_ids = {"native": iter_native_text_ids, "cuda_graph": iter_captured_text_ids}.get(chosen)
        if iter_ids and (sampler := sampler_of(model, options)):
            steps = iter_ids(model, prompts, own, max_new_tokens, eos_ids(model), sampler, share_prefix)
            for new in steps:
                for i, id in zip(batch, new):
                    answers[i] += [] if id is None else [id]
        else:
            rows = _generate_by_transformers(model, prompts, own, max_new_tokens, share_prefix, options)
            for i, row in zip(batch, rows):
                answers[i] = row
    return answers


def iter_text_ids(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    images: Sequence[Tensor | ReadImages],
    max_new_tokens: int = 32,
    seed: int | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    backend: str = "auto",
) -> Iterator[list[int | None]]:
    """Yield the next id of each prompt, None for finished answers, until all are finished.

    Arguments and greedy ids as `generate_text_ids`. Arguments are checked by the call itself, not by the
    first step; closing the iterator stops generation.

    Args:
        do_sample: sample with temperature, top_k and top_p; else greedy.
        backend: see `choose_backend`.
    """
    check_questions(prompt_ids, max_new_tokens, 1, model.config)
    sampling = Sampling(1.0, temperature, top_k, top_p, greedy=not do_sample)
    generator = None if seed is None else torch.Generator(model.device).manual_seed(check_seed(seed))
    if not prompt_ids:
        return iter(())
    sampler = GumbelSampler(sampling, generator) if do_sample else GreedySampler()
    arguments = (model, prompt_ids, images, max_new_tokens, eos_ids(model), sampler)
    chosen = choose_backend(model, backend, num_steps=max_new_tokens - 1, text_options={})
    if chosen == "cuda_graph":
        return iter_captured_text_ids(*arguments, group=1)  # each id is wanted as soon as it is there
    return iter_native_text_ids(*arguments) if chosen == "native" else _iter_eager(*arguments)


@torch.no_grad()
def _iter_eager(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    images: Sequence[Tensor | ReadImages],
    max_new_tokens: int,
    ends: set[int],
    pick: Callable[[Tensor], Tensor],
) -> Iterator[list[int | None]]:
    rows = range(len(prompt_ids))
    decoder = prefill_text(model, prompt_ids, images, False, rows, max_steps=max_new_tokens - 1)
    active, hidden = [True] * len(rows), decoder.hidden
    for left in reversed(range(max_new_tokens)):
        logits = model.text_logits(hidden).float()
        if left == max_new_tokens - 1:
            check_logits(logits, model)
        new = pick(logits)
        ids = new.tolist()
        # finished rows stay in the batch; their ids are dropped
        active = [on and id not in ends for on, id in zip(active, ids)]
        if not any(active):
            return
        yield [id if on else None for on, id in zip(active, ids)]
        if left:  # the last id is never an input
            hidden = decoder.decode_step(model.get_input_embeddings()(new).unsqueeze(1))


def _generate_by_transformers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    images: Sequence[Tensor | ReadImages],
    max_new_tokens: int,
    share_prefix: bool,
    options: dict[str, Any],
) -> list[list[int]]:
    """The new ids of one batch by transformers' `generate`, with all its options."""
    # penalties and guidance need the ids of the whole prompt, which a cached prefix does not have
    share_prefix = share_prefix and options.keys() <= _PREFIX_OPTIONS
    prefixes = shared_prefixes(model, prompts, images) if share_prefix else []
    if prefixes:
        inputs = _continue_prefixes(model, prompts, prefixes, options.get("num_beams", 1))
    else:
        ids, mask = pad_left(prompts, model)
        # with image_codes, even without images, the model's `generate` returns only the new ids
        inputs = {"input_ids": ids, "attention_mask": mask, **join_images(images, model)}
    settings = {"do_sample": False, "pad_token_id": pad_id(model), **options}
    try:
        new = model.generate(**inputs, max_new_tokens=max_new_tokens, **settings)
    except (ValueError, TypeError, AttributeError, NotImplementedError, ImportError, OSError) as error:
        if isinstance(error, UserError) or not options:
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"Options {', '.join(options)} are not valid: {reason}") from error
    return [truncate_at_eos(row, eos_ids(model)) for row in new.tolist()]


@torch.no_grad()
def _continue_prefixes(
    model: Any, prompts: Sequence[Sequence[int]], prefixes: Sequence[SharedPrefix], num_beams: int
) -> dict[str, Any]:
    """Prefill each prefix once; returns the inputs of `generate` that continue from them."""
    cache, mask, rests = prefill_prefixes(model, prompts, prefixes, num_beams)
    ids, rest_mask = pad_left(rests, model)
    vectors = model.get_input_embeddings()(ids)
    # `generate` skips as many inputs as the cache has entries: their values do not matter, use zeros
    cached = vectors.new_zeros(len(prompts), mask.shape[1], vectors.shape[2])
    return {
        "inputs_embeds": torch.cat([cached, vectors], dim=1),
        "attention_mask": torch.cat([mask, rest_mask], dim=1),
        "past_key_values": cache,
    }


def stream_text(processor: Any, steps: Iterator[list[int | None]], count: int) -> Iterator[list[str]]:
    """Turn the new ids of `count` answers, per step, into new pieces of text.

    Pieces are final: text that later ids could still change is held back.
    """
    ids: list[list[int]] = [[] for _ in range(count)]
    shown = [""] * count
    for new in steps:
        for row, id in zip(ids, new):
            row += [] if id is None else [id]
        # decode the whole answer: the text of an id depends on its neighbours (spaces, bytes)
        settled = [processor.decode_settled(row).strip() for row in ids]
        yield [text[len(old) :] for old, text in zip(shown, settled)]
        shown = settled
    complete = [processor.decode(row).strip() for row in ids]
    if complete != shown:
        yield [text[len(old) :] for old, text in zip(shown, complete)]


def eos_ids(model: Any) -> set[int]:
    """The end-of-sequence ids."""
    # generation_config.json takes precedence, as in transformers; it may hold several ids
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = model.config.eos_token_id if ends is None else ends
    return set() if ends is None else set(ends) if isinstance(ends, (list, tuple)) else {ends}


def truncate_at_eos(row: Sequence[int], ends: set[int]) -> list[int]:
    """The ids before the first end-of-sequence id."""
    return list(row[: next((i for i, x in enumerate(row) if x in ends), len(row))])
