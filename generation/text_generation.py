"""Answers to batches of prompts with images in them, left-padded so that all rows end together.

B prompts, L longest prompt, I images of a batch, N visual tokens per image, K sub-codebooks, D decoder width.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from open_unitok.core.errors import UserError

from .backends.native_text import can_write, write
from .kv_cache import CachedDecoder, context_length, pad_left
from .sampling import Sampling, check_seed, choose
from .validation import check_whole


def generate_text_ids(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    image_codes: Sequence[Tensor],
    max_new_tokens: int = 32,
    batch_size: int = 128,
    seed: int | None = None,
    share_prefix: bool = True,
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
        share_prefix: read what prompts about the same images have in common once a batch.
        options: of transformers' `generate` (do_sample, num_beams, temperature, ...); without any, greedy.

    Raises:
        UserError: an empty prompt, one that is too long, or a number out of range.
    """
    config = model.config
    check_answering(prompt_ids, max_new_tokens, batch_size, config)
    check_whole("num_beams", options.get("num_beams", 1))
    if options.get("num_return_sequences", 1) != 1:
        raise UserError("num_return_sequences must be 1: ask the question several times instead.")
    ends = end_ids(model)
    if seed is not None:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(check_seed(seed))
            return generate_text_ids(
                model, prompt_ids, image_codes, max_new_tokens, batch_size, None, share_prefix, **options
            )
    answers: list[list[int]] = [[] for _ in prompt_ids]
    order = sorted(range(len(prompt_ids)), key=lambda i: -len(prompt_ids[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        prompts, codes = [prompt_ids[i] for i in batch], [image_codes[i] for i in batch]
        heads = common_heads(prompts, codes) if share_prefix else []
        if can_write(model, options):
            for new in _write(model, prompts, codes, heads, max_new_tokens, lambda x: x.argmax(-1)):
                for i, id in zip(batch, new):
                    answers[i] += [] if id is None else [id]
            continue
        if 0 < len(heads) < len(prompts) and can_share(model, prompts, heads):
            inputs = after_heads(model, prompts, heads, options.get("num_beams", 1))
        else:
            ids, mask = pad_left(prompts, pad_id(model), model.device)
            # no images are given as such: with image_codes, `generate` returns the new ids alone
            inputs = {"input_ids": ids, "attention_mask": mask, "image_codes": join_codes(codes, model)}
        settings = {"do_sample": False, "pad_token_id": pad_id(model), **options}
        new = model.generate(**inputs, max_new_tokens=max_new_tokens, **settings)
        for i, row in zip(batch, new.tolist()):
            answers[i] = until_end(row, ends)
    return answers


class Head(NamedTuple):
    """The beginning that some prompts of a batch share."""

    ids: list[int]
    codes: Tensor  # (n, N, K), its images
    rows: list[int]


def common_heads(prompts: Sequence[Sequence[int]], image_codes: Sequence[Tensor]) -> list[Head]:
    """What the prompts about the same images have in common, at most all but their last id."""
    groups: dict[Any, list[int]] = {}
    for i, codes in enumerate(image_codes):
        groups.setdefault((tuple(codes.shape), codes.cpu().numpy().tobytes()), []).append(i)
    heads = []
    for rows in groups.values():
        first = list(prompts[rows[0]])
        length = min(len(prompts[i]) for i in rows) - 1
        for i in rows[1:]:
            differs = (j for j in range(length) if prompts[i][j] != first[j])
            length = next(differs, length)
        heads.append(Head(first[:length], image_codes[rows[0]], rows))
    return heads


def can_share(model: Any, prompts: Sequence[Sequence[int]], heads: Sequence[Head]) -> bool:
    """True if all images stand in the heads, and the decoder sees all that is behind: gaps move windows."""
    mark = model.config.image_token_id
    if any(mark in prompts[row][len(head.ids) :] for head in heads for row in head.rows):
        return False
    kinds = getattr(model.config.text_config, "layer_types", None) or []
    return all(head.ids for head in heads) and all(kind == "full_attention" for kind in kinds)


@torch.no_grad()
def after_heads(
    model: Any, prompts: Sequence[Sequence[int]], heads: Sequence[Head], beams: int
) -> dict[str, Any]:
    """What `generate` takes to go on behind the heads, each of which is read once."""
    ids, mask = pad_left([head.ids for head in heads], pad_id(model), model.device)
    cache = DynamicCache(config=model.config.text_config)
    model.language_model(
        inputs_embeds=model.embed_inputs(ids, join_codes([head.codes for head in heads], model)),
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
    )
    head_of = {row: i for i, head in enumerate(heads) for row in head.rows}
    select = torch.tensor([head_of[row] for row in range(len(prompts))], device=model.device)
    cache.batch_select_indices(select.repeat_interleave(beams))
    tails = [prompt[len(heads[head_of[row]].ids) :] for row, prompt in enumerate(prompts)]
    tail_ids, tail_mask = pad_left(tails, pad_id(model), model.device)
    vectors = model.get_input_embeddings()(tail_ids)
    read = vectors.new_zeros(len(prompts), ids.shape[1], vectors.shape[2])  # `generate` skips what is cached
    return {
        "inputs_embeds": torch.cat([read, vectors], dim=1),
        "attention_mask": torch.cat([mask[select], tail_mask], dim=1),
        "past_key_values": cache,
    }


def iter_text_ids(
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

    Arguments and greedy ids as `generate_text_ids`. The call itself, not the first step, rejects wrong
    arguments; closing the iterator stops the work.

    Args:
        do_sample: draw with temperature, top_k and top_p; else take the likeliest.
    """
    check_answering(prompt_ids, max_new_tokens, 1, model.config)
    sampling = Sampling(1.0, temperature, top_k, top_p, greedy=not do_sample)
    generator = None if seed is None else torch.Generator(model.device).manual_seed(check_seed(seed))
    if not prompt_ids:
        return iter(())

    def pick(logits: Tensor) -> Tensor:
        gumbel = None
        if not sampling.greedy:
            gumbel = torch.empty_like(logits).exponential_(generator=generator).log_().neg_()
        return choose(logits, sampling, gumbel)

    if can_write(model, {}):
        heads = common_heads(prompt_ids, image_codes)
        return _write(model, prompt_ids, image_codes, heads, max_new_tokens, pick)
    return _write_by_torch(model, prompt_ids, image_codes, max_new_tokens, pick)


def _write(
    model: Any,
    prompts: Sequence[Sequence[int]],
    image_codes: Sequence[Tensor],
    heads: Sequence[Head],
    count: int,
    pick: Callable[[Tensor], Tensor],
) -> Iterator[list[int | None]]:
    """`write` with those of the heads that can be shared, each prompt for itself where none can."""
    shared = [h for h in heads if len(h.rows) > 1 and can_share(model, prompts, [h])]
    loners = set(range(len(prompts))).difference(*(h.rows for h in shared))
    heads = shared + [Head([], image_codes[i], [i]) for i in loners]
    return write(
        model, prompts, image_codes, heads, count, end_ids(model), lambda c: join_codes(c, model), pick
    )


@torch.no_grad()
def _write_by_torch(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    image_codes: Sequence[Tensor],
    max_new_tokens: int,
    pick: Callable[[Tensor], Tensor],
) -> Iterator[list[int | None]]:
    ids, mask = pad_left(prompt_ids, pad_id(model), model.device)
    embeds = model.embed_inputs(ids, join_codes(image_codes, model))
    decoder = CachedDecoder(
        model.language_model, embeds, mask, torch.arange(len(ids)), room=max_new_tokens - 1
    )
    ends, going, hidden = end_ids(model), [True] * len(ids), decoder.hidden
    for left in reversed(range(max_new_tokens)):
        new = pick(model.text_logits(hidden).float())
        rows = new.tolist()
        going = [on and row not in ends for on, row in zip(going, rows)]
        if not any(going):
            return
        yield [row if on else None for on, row in zip(going, rows)]
        if left:
            hidden = decoder.step(model.get_input_embeddings()(new).unsqueeze(1))


def text_pieces(processor: Any, steps: Iterator[list[int | None]], count: int) -> Iterator[list[str]]:
    """New ids of `count` answers, step by step -> new pieces of their texts."""
    written: list[list[int]] = [[] for _ in range(count)]
    shown = [""] * count
    for new in steps:
        for row, token in zip(written, new):
            row += [] if token is None else [token]
        seen = [processor.decode_settled(row).strip() for row in written]
        yield [text[len(old) :] for old, text in zip(shown, seen)]
        shown = seen
    whole = [processor.decode(row).strip() for row in written]
    if whole != shown:
        yield [text[len(old) :] for old, text in zip(shown, whole)]


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
        UserError: see `generate_text_ids`.
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
