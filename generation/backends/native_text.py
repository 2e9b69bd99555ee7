"""Answers through the C++ steps: prompts are read piece by piece, words written for all rows at once.

P prompts, L longest prompt, D decoder width. Reading is bound by multiplications, which batches do not make
cheaper; writing is bound by the reading of weights, which all rows share. So the pieces that are read are as
small as the caches like, and rows whose answers have ended take part no more.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ..kv_cache import pad_left
from . import native_library
from .eager import is_plain, layer_struct, native_can, stack_struct

PIECE = 512  # tokens read at once, where prompts are short
# of a generation config, what a greedy answer may come with
PLAIN = {"bos_token_id", "eos_token_id", "pad_token_id", "max_length", "do_sample", "temperature", "top_k"}
PLAIN |= {"top_p", "transformers_version", "_from_model_config", "output_attentions", "output_hidden_states"}
PLAIN |= {"use_cache"}


def can_write(model: Any, options: dict[str, Any]) -> bool:
    """True if these options of `generate` mean the likeliest words of a model that the C++ steps know."""
    config = model.generation_config.to_diff_dict()
    known = config.keys() <= PLAIN and not any(options.values()) and is_plain(model.lm_head, model.dtype)
    return known and native_can(model)


class Writer:
    """Prompts behind the decoder's cache, in which row i ends at place `slot`.

    Attributes:
        hidden: (P, D) decoder states at the last ids of the prompts.
    """

    def __init__(self, model: Any, lengths: Sequence[int], room: int):
        self.model, self.slot = model, max(lengths)
        self.starts = torch.tensor([self.slot - length for length in lengths])
        text, places = model.config.text_config, self.slot + room
        shape = (len(lengths), text.num_key_value_heads, places, text.head_dim)
        self.caches = [(torch.empty(shape), torch.empty(shape)) for _ in range(text.num_hidden_layers)]
        self.hidden = torch.empty(len(lengths), text.hidden_size, dtype=model.dtype)
        self.keep, decoder = native_library.Keeper(), model.language_model
        layers = [layer_struct(self.keep, layer) for layer in decoder.layers]
        self.stack = stack_struct(
            self.keep, layers, text, decoder.norm, self.caches, decoder.rotary_emb, places
        )
        self.output = self.keep.linear(model.lm_head)

    def read(
        self, rows: Sequence[int], head: Sequence[int], tails: Sequence[Sequence[int]], codes: Any
    ) -> None:
        """Take in the prompts of some rows: what they begin with, and how each goes on.

        Args:
            codes: (I, N, K) of the images, which stand in the head or, without one, in the tails.
        """
        model, cache = self.model, DynamicCache(config=self.model.config.text_config)
        if head:
            embeds = model.embed_inputs(torch.tensor([list(head)]), codes)
            model.language_model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(len(rows))
            codes = None
        ids, mask = pad_left(tails, model.config.pad_token_id or 0, "cpu")
        seen = mask.new_ones(len(rows), len(head))
        mask = torch.cat([seen, mask], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, len(head) :]
        self.hidden[list(rows)] = model.language_model(
            inputs_embeds=model.embed_inputs(ids, codes),
            attention_mask=None if bool(mask.all()) else mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        for i, (row, tail) in enumerate(zip(rows, tails)):
            middle = self.slot - len(tail)  # where its tail begins
            for layer, states in zip(cache.layers, self.caches):
                for read, there in zip((layer.keys, layer.values), states):
                    there[row, :, middle : self.slot] = read[i, :, read.shape[2] - len(tail) :]
                    there[row, :, middle - len(head) : middle] = read[i, :, : len(head)]

    def step(self, rows: Tensor, ids: Tensor) -> Tensor:
        """The next ids (R,) of some rows (R,) -> logits (R, vocabulary) of those after them."""
        entry = self.model.get_input_embeddings()(ids).float().contiguous()
        starts, logits = self.starts[rows], torch.empty(len(rows), self.output.outputs)
        native_library.library().logits_step(
            ctypes.addressof(self.stack), ctypes.addressof(self.output), len(rows), self.slot,
            starts.data_ptr(), rows.data_ptr(), entry.data_ptr(), logits.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        self.slot += 1
        return logits


@torch.no_grad()
def write(
    model: Any,
    prompts: Sequence[Sequence[int]],
    image_codes: Sequence[Tensor],
    heads: Sequence[Any],
    count: int,
    ends: set[int],
    join: Callable[[Sequence[Tensor]], Tensor],
    pick: Callable[[Tensor], Tensor],
) -> Iterator[list[int | None]]:
    """Yield the next id of each prompt, None where its answer has ended, up to `count` times.

    Args:
        heads: of `common_heads`, for prompts that share theirs; the others are read as they are.
        join: the codes of several prompts as one tensor.
        pick: logits (R, vocabulary) of the answers that go on -> their next ids (R,).
    """
    writer = Writer(model, [len(prompt) for prompt in prompts], room=count - 1)
    alone = []
    for head in heads:
        if len(head.rows) > 1 and head.ids:
            tails = [list(prompts[row][len(head.ids) :]) for row in head.rows]
            writer.read(head.rows, head.ids, tails, join([head.codes]))
        else:
            alone += head.rows
    alone.sort(key=lambda row: len(prompts[row]))
    while alone:  # short ones together, as long as they fill a piece
        most = next((i for i in range(len(alone), 1, -1) if i * len(prompts[alone[i - 1]]) <= PIECE), 1)
        piece, alone = alone[:most], alone[most:]
        writer.read(piece, (), [prompts[row] for row in piece], join([image_codes[row] for row in piece]))
    rows = torch.arange(len(prompts))
    logits = model.text_logits(writer.hidden).float()
    for left in reversed(range(count)):
        new = pick(logits)
        going = torch.tensor([id not in ends for id in new.tolist()], dtype=torch.bool)
        rows, new = rows[going], new[going]
        if not len(rows):
            return
        written = dict(zip(rows.tolist(), new.tolist()))
        yield [written.get(row) for row in range(len(prompts))]
        if left:
            logits = writer.step(rows, new)
