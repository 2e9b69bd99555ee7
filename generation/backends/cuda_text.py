"""Answers with captured decode steps: embedding, decoder, output layer, choice of the next id in one graph.

The caches and the capture are those of images. Rows that reach their end of sequence stay in the batch, and
the host looks for ends only once in `group` steps: surplus ids are cut off.

P prompts, R rows of the captured step (P rounded up), V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from open_unitok.mllm.features import ReadImages
from open_unitok.mllm.loading import check_logits

from ..kv_cache import prefill_text
from .captured_step import borrow_step, round_up
from .static_cache import StaticDecoder
from .text_samplers import GreedySampler

GROUP = 8  # steps after which the host reads the new ids


@torch.no_grad()
def iter_captured_text_ids(
    model: Any,
    prompts: Sequence[Sequence[int]],
    images: Sequence[Tensor | ReadImages],
    max_new_tokens: int,
    eos_ids: set[int],
    sampler: GreedySampler,
    share_prefix: bool = True,
    group: int = GROUP,
) -> Iterator[list[int | None]]:
    """Yield the next id of each prompt, None for finished answers, until all are finished.

    Args:
        share_prefix: prefill the common prefix of prompts about the same images once.
        group: ids of this many steps are read from the device at a time; 1 = each as soon as it is there.
    """
    count = len(prompts)
    rows = round_up_rows(count)
    select = [*range(count), *[0] * (rows - count)]
    decoder = prefill_text(model, prompts, images, share_prefix, select, max_steps=0)
    logits = model.text_logits(decoder.hidden[:count]).float()
    check_logits(logits, model)
    first = sampler(logits)
    new = first.tolist()
    active = [id not in eos_ids for id in new]
    if not any(active):
        return
    yield [id if on else None for id, on in zip(new, active)]
    left = max_new_tokens - 1  # the last id is never an input
    if not left:
        return
    capacity = round_up(decoder.length + left)
    with borrow_step(model, ("text", rows, capacity, sampler.key)) as captured:
        static = StaticDecoder(captured, decoder, capacity)
        ids = captured.keep("ids", torch.cat([first, first.new_zeros(rows - count)]))
        # exponential numbers must not be 0, also for rows whose ids are dropped
        noise = captured.buffer("noise", (rows, logits.shape[1]) if sampler.random else (0, 0), logits)
        noise.fill_(1)

        def step() -> None:
            vectors = model.get_input_embeddings()(ids).unsqueeze(1)
            hidden = static.decode_step(vectors)
            ids.copy_(sampler.choose(model.text_logits(hidden).float(), noise))

        replay = captured.compile(step, (*static.counters, ids))
        chunk = ids.new_empty(group, count)
        for start in range(0, left, group):
            size, states = min(group, left - start), []
            for i in range(size):
                states.append(sampler.global_state(ids.device))
                sampler.fill(noise[:count])
                replay()
                chunk[i] = ids[:count]
            for i, new in enumerate(chunk[:size].tolist()):
                active = [on and id not in eos_ids for on, id in zip(active, new)]
                if not any(active):
                    if i + 1 < size:  # the surplus steps sampled numbers that nobody used
                        sampler.set_global_state(states[i + 1], ids.device)
                    return
                yield [id if on else None for id, on in zip(new, active)]


def round_up_rows(count: int) -> int:
    """The rows of the step that decodes `count` prompts, so that few numbers of rows are captured."""
    return 1 << (count - 1).bit_length() if count < 16 else -(-count // 16) * 16
