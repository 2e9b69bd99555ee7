"""Text generation with the native backend: prefill in small chunks, then decode all prompts in one batch.

Prefill is compute-bound, and batching does not make it cheaper: chunks are small enough for the processor's
caches. Decoding is bound by reading the weights, which all rows share; rows that reach their end of sequence
leave the batch.

P prompts, R rows still decoding, D decoder width.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from open_unitok.mllm.features import ReadImages
from open_unitok.mllm.loading import check_logits

from ..kv_cache import SharedPrefix, can_share, find_shared_prefixes, join_images, pad_left
from . import native_library
from .native import layer_struct, stack_struct

_CHUNK_TOKENS = 512  # maximum tokens of several prompts that are prefilled together
# Keys of a generation config that do not change greedy decoding.
_GREEDY_KEYS = {
    "bos_token_id", "eos_token_id", "pad_token_id", "max_length", "do_sample", "temperature", "top_k",
    "top_p", "transformers_version", "_from_model_config", "output_attentions", "output_hidden_states",
    "use_cache",
}  # fmt: skip


_ONE_ANSWER = (("num_beams", 1), ("num_return_sequences", 1))


def find_option(model: Any, options: dict[str, Any]) -> str | None:
    """The first option of transformers' `generate` that asks for more than greedy decoding; None = none."""
    # any other key of the generation config, such as repetition_penalty, may change the logits
    other = model.generation_config.to_diff_dict().keys() - _GREEDY_KEYS
    wanted = [
        name
        for name, value in options.items()
        # without do_sample these have no effect, and one beam or sequence is the default
        if value and name not in ("temperature", "top_k", "top_p") and (name, value) not in _ONE_ANSWER
    ]
    return next(iter(wanted), min(other, default=None))


def iter_native_text_ids(
    model: Any,
    prompts: Sequence[Sequence[int]],
    images: Sequence[Tensor | ReadImages],
    max_new_tokens: int,
    eos_ids: set[int],
    pick: Callable[[Tensor], Tensor],
    share_prefix: bool = True,
) -> Iterator[list[int | None]]:
    """Yield the next id of each prompt, None for finished answers, until all are finished.

    Args:
        pick: logits (R, vocabulary) -> the next ids (R,).
        share_prefix: prefill the common prefix of prompts about the same images once.
    """
    found = find_shared_prefixes(prompts, images) if share_prefix else []
    shared = [p for p in found if len(p.rows) > 1 and p.ids and can_share(model, prompts, [p])]
    alone = set(range(len(prompts))).difference(*(p.rows for p in shared))
    return _iter_ids(model, prompts, images, shared, sorted(alone), max_new_tokens, eos_ids, pick)


@torch.no_grad()
def _iter_ids(
    model: Any,
    prompts: Sequence[Sequence[int]],
    images: Sequence[Tensor | ReadImages],
    shared: Sequence[SharedPrefix],
    alone: list[int],
    max_new_tokens: int,
    eos_ids: set[int],
    pick: Callable[[Tensor], Tensor],
) -> Iterator[list[int | None]]:
    decoder = NativeTextDecoder(model, [len(prompt) for prompt in prompts], max_steps=max_new_tokens - 1)
    for prefix in shared:
        rests = [list(prompts[row][len(prefix.ids) :]) for row in prefix.rows]
        decoder.prefill(prefix.rows, prefix.ids, rests, join_images([prefix.images], model))
    alone.sort(key=lambda row: len(prompts[row]))
    while alone:  # sorted by length: as many as fit a chunk when padded to the longest, at least one
        size = next(
            (i for i in range(len(alone), 1, -1) if i * len(prompts[alone[i - 1]]) <= _CHUNK_TOKENS), 1
        )
        chunk, alone = alone[:size], alone[size:]
        own = join_images([images[row] for row in chunk], model)
        decoder.prefill(chunk, (), [prompts[row] for row in chunk], own)
    rows = torch.arange(len(prompts))
    logits = model.text_logits(decoder.hidden).float()
    check_logits(logits, model)
    for left in reversed(range(max_new_tokens)):
        new = pick(logits)
        # finished rows leave the batch: a decode step costs less
        active = torch.tensor([id not in eos_ids for id in new.tolist()], dtype=torch.bool)
        rows, new = rows[active], new[active]
        if not len(rows):
            return
        by_row = dict(zip(rows.tolist(), new.tolist()))
        yield [by_row.get(row) for row in range(len(prompts))]
        if left:
            logits = decoder.decode_step(rows, new)


class NativeTextDecoder:
    """The decoder with a KV cache in which all prompts end at the same index.

    Args:
        lengths: number of ids of each of the P prompts.
        max_steps: capacity of the cache beyond the longest prompt.

    Attributes:
        hidden: (P, D) decoder states at the last ids of the prompts.
    """

    def __init__(self, model: Any, lengths: Sequence[int], max_steps: int):
        self.model, self.cache_index = model, max(lengths)
        self.starts = torch.tensor([self.cache_index - length for length in lengths])  # padding of each row
        # float32 as in C++, also for bfloat16 models
        text, capacity = model.config.text_config, self.cache_index + max_steps
        shape = (len(lengths), text.num_key_value_heads, capacity, text.head_dim)
        self.caches = [(torch.empty(shape), torch.empty(shape)) for _ in range(text.num_hidden_layers)]
        self.hidden = torch.empty(len(lengths), text.hidden_size, dtype=model.dtype)
        self.builder, decoder = native_library.StructBuilder(), model.language_model
        layers = [layer_struct(self.builder, layer) for layer in decoder.layers]
        self.stack = stack_struct(
            self.builder, layers, text, decoder.norm, self.caches, decoder.rotary_emb, capacity
        )
        self.output = self.builder.linear(model.lm_head)

    def prefill(
        self,
        rows: Sequence[int],
        prefix: Sequence[int],
        rests: Sequence[Sequence[int]],
        images: dict[str, Any],
    ) -> None:
        """Prefill the prompts of some rows: a common prefix, which may be empty, and the rest of each.

        Args:
            images: of `join_images`; they are in the prefix or, without a prefix, in the rests.
        """
        model, cache = self.model, DynamicCache(config=self.model.config.text_config)
        if prefix:
            embeds = model.embed_inputs(torch.tensor([list(prefix)]), **images)
            model.language_model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(len(rows))
            images = {}  # `can_share` guarantees that the rests have no images
        ids, mask = pad_left(rests, model)
        mask = torch.cat([mask.new_ones(len(rows), len(prefix)), mask], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, len(prefix) :]
        self.hidden[list(rows)] = model.language_model(
            inputs_embeds=model.embed_inputs(ids, **images),
            attention_mask=None if bool(mask.all()) else mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        # torch's cache is prefix, padding, rest; ours is padding, prefix, rest: C++ needs contiguous rows
        for i, (row, rest) in enumerate(zip(rows, rests)):
            middle = self.cache_index - len(rest)
            for layer, states in zip(cache.layers, self.caches):
                found: Any = layer  # filled by the prefill
                for read, buffer in zip((found.keys, found.values), states):
                    buffer[row, :, middle : self.cache_index] = read[i, :, read.shape[2] - len(rest) :]
                    buffer[row, :, middle - len(prefix) : middle] = read[i, :, : len(prefix)]

    def decode_step(self, rows: Tensor, ids: Tensor) -> Tensor:
        """One decode step: the last ids (R,) of the rows (R,) -> logits (R, vocabulary) of the next ids."""
        entry = self.model.get_input_embeddings()(ids).float().contiguous()
        starts, logits = self.starts[rows], torch.empty(len(rows), self.output.outputs)
        native_library.load_library().logits_step(
            ctypes.addressof(self.stack), ctypes.addressof(self.output), len(rows), self.cache_index,
            starts.data_ptr(), rows.data_ptr(), entry.data_ptr(), logits.data_ptr(),
            native_library.num_threads(),
        )  # fmt: skip
        self.cache_index += 1
        return logits
