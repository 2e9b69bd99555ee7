"""The language model with its KV cache: prefill a batch of prompts, then one decode step per token.

U unique prompts, R rows of the batch, L longest prompt, n new inputs per row, D decoder width, I images of a
batch, N visual tokens per image, K sub-codebooks.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from open_unitok.core.codes import as_int64
from open_unitok.mllm.features import ReadImages


def prefill_text(
    model: Any,
    prompts: Sequence[Sequence[int]],
    images: Sequence[Tensor | ReadImages],
    share_prefix: bool,
    select: Sequence[int],
    max_steps: int,
) -> "CachedDecoder":
    """Prefill prompts with images; up to `max_steps` decode steps may follow.

    Args:
        share_prefix: prefill the common prefix of prompts about the same images once.
        select: the prompt of each of the R rows of the batch.
    """
    rows = torch.tensor(select, device=model.device)
    prefixes = shared_prefixes(model, prompts, images) if share_prefix else []
    if not prefixes:
        ids, mask = pad_left(prompts, model)
        embeds = model.embed_inputs(ids, **join_images(images, model))
        return CachedDecoder(model.language_model, embeds, mask, rows, max_steps)
    cache, mask, rests = prefill_prefixes(model, prompts, prefixes)
    ids, rest_mask = pad_left(rests, model)
    mask = torch.cat([mask, rest_mask], dim=1)
    embeds = model.get_input_embeddings()(ids)
    return CachedDecoder(model.language_model, embeds, mask, rows, max_steps, cache)


def prefill_prefixes(
    model: Any, prompts: Sequence[Sequence[int]], prefixes: Sequence["SharedPrefix"], num_beams: int = 1
) -> tuple[DynamicCache, Tensor, list[Sequence[int]]]:
    """Prefill each prefix once: a cache with one row per prompt and beam, the mask (P, L) of the prompts'
    prefixes, and the rest of each prompt."""
    ids, mask = pad_left([prefix.ids for prefix in prefixes], model)
    cache = DynamicCache(config=model.config.text_config)
    model.language_model(
        inputs_embeds=model.embed_inputs(ids, **join_images([prefix.images for prefix in prefixes], model)),
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
    )
    prefix_of = {row: i for i, prefix in enumerate(prefixes) for row in prefix.rows}
    # beams of one prompt are consecutive rows in `generate`
    select = torch.tensor([prefix_of[row] for row in range(len(prompts))], device=model.device)
    cache.batch_select_indices(select.repeat_interleave(num_beams))
    rests = [prompt[len(prefixes[prefix_of[row]].ids) :] for row, prompt in enumerate(prompts)]
    return cache, mask[select], rests


def prefill(model: Any, rows: Sequence[Sequence[int]], max_steps: int) -> "CachedDecoder":
    """Prefill R prompts of text ids, equal ones once; up to `max_steps` decode steps of an image may
    follow."""
    # dict.fromkeys removes duplicates and keeps the order
    index = {row: i for i, row in enumerate(dict.fromkeys(map(tuple, rows)))}
    ids, mask = pad_left(list(index), model)
    select = torch.tensor([index[tuple(row)] for row in rows], device=model.device)
    return CachedDecoder(model.context_decoder, model.get_input_embeddings()(ids), mask, select, max_steps)


class CachedDecoder:
    """The language model with a preallocated KV cache.

    Args:
        embeds: (U, L, D) left-padded inputs; mask: (U, L) int64, 0 on padding.
        select: (R,) the row of `embeds` of each row of the batch. Equal prompts (unconditional rows, many
            images of one prompt) are prefilled once, then their cache is copied.
        max_steps: capacity of the cache beyond L.
        cache: of U earlier inputs, which `mask` covers as well.

    Attributes:
        hidden: (R, D) states at the last input.
        length: entries of the cache in use, padding included.
    """

    def __init__(
        self,
        language_model: Any,
        embeds: Tensor,
        mask: Tensor,
        select: Tensor,
        max_steps: int,
        cache: DynamicCache | None = None,
    ):
        self.language_model = language_model
        self.length = mask.shape[1]
        padded = bool((mask == 0).any())  # without a mask, attention uses faster kernels
        positions = (mask.cumsum(-1) - 1).clamp(min=0)  # real tokens count from 0
        cache = DynamicCache(config=language_model.config) if cache is None else cache
        states = language_model(
            inputs_embeds=embeds,
            attention_mask=mask if padded else None,
            position_ids=positions[:, -embeds.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        # left padding: the last column holds the last token of every prompt
        self.hidden = states[select, -1]
        self.cache = expand_cache(cache, select, max_steps)
        self.positions = positions[select, -1:]
        self.mask = (
            torch.cat([mask[select], mask.new_ones(len(select), max_steps)], dim=1) if padded else None
        )

    def decode_step(self, vectors: Tensor) -> Tensor:
        """(R, n, D) next n inputs -> (R, D) states at the last of them."""
        new = vectors.shape[1]
        # positions count real tokens only, `length` counts padding as well
        positions = self.positions + torch.arange(1, new + 1, device=self.positions.device)
        self.positions = positions[:, -1:]
        self.length += new
        return self.language_model(
            inputs_embeds=vectors,
            attention_mask=None if self.mask is None else self.mask[:, : self.length],
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]


class PreallocatedLayer(DynamicLayer):
    """Preallocated KV-cache layer: `update` writes in place instead of concatenating.

    Args:
        layer: the layer after prefill.
        select: (R,) the row of `layer` that each row of the batch continues.
        max_steps: capacity beyond the current length.
    """

    def __init__(self, layer: DynamicLayer, select: Tensor, max_steps: int):
        # `keys` and `values` are views of the filled part of `buffers`: transformers reads their length
        super().__init__()
        assert layer.keys is not None and layer.values is not None
        self.lazy_initialization(layer.keys, layer.values)
        self.buffers = [_preallocate(x, select, max_steps) for x in (layer.keys, layer.values)]
        self._set_length(layer.keys.shape[2])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (R, heads, n, width); return views of all entries so far."""
        assert self.keys is not None
        start, new = self.keys.shape[2], key_states.shape[2]
        self.buffers[0][:, :, start : start + new] = key_states
        self.buffers[1][:, :, start : start + new] = value_states
        return self._set_length(start + new)

    def _set_length(self, length: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (x[:, :, :length] for x in self.buffers)
        return self.keys, self.values


def _preallocate(states: Tensor, select: Tensor, max_steps: int) -> Tensor:
    """(U, heads, L, width) -> (R, heads, L + max_steps, width), the new part uninitialised."""
    _, heads, length, width = states.shape
    buffer = states.new_empty(len(select), heads, length + max_steps, width)
    buffer[:, :, :length] = states[select]
    return buffer


def expand_cache(cache: Cache, select: Tensor, max_steps: int) -> Cache:
    """The cache with the rows `select` (repeats allowed) and capacity for `max_steps` more entries."""
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = PreallocatedLayer(layer, select, max_steps)
        else:  # sliding windows: transformers' own layers, which concatenate
            layer.batch_select_indices(select)  # type: ignore[attr-defined]
    return cache


def pad_left(rows: Sequence[Sequence[int]], model: Any) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, L) int64 on the model's device; all rows end together.

    The mask depends on the lengths, not on the ids: a pad id that is part of a prompt stays visible.
    """
    longest, pad = max(map(len, rows)), pad_id(model)
    ids = [[pad] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=model.device), torch.tensor(mask, device=model.device)


def pad_id(model: Any) -> int:
    """The padding id; any id of the vocabulary works, because the mask hides it."""
    return model.config.pad_token_id or 0


def join_images(images: Sequence[Tensor | ReadImages], model: Any) -> dict[str, Tensor | None]:
    """The images of several prompts as arguments of the model: all codes (I, N, K), where I may be 0, and all
    features."""
    config, read = model.config, [_as_read(entry) for entry in images]
    codes = [as_int64(entry.codes) for entry in read if len(entry.codes)]
    empty = torch.zeros(0, config.num_image_tokens, config.num_codebooks, dtype=torch.long)
    features = [entry.features for entry in read if entry.features is not None and len(entry.features)]
    joined = ReadImages(torch.cat(codes) if codes else empty, torch.cat(features) if features else None)
    return joined.inputs(model.device)


def _as_read(images: Tensor | ReadImages) -> ReadImages:
    return images if isinstance(images, ReadImages) else ReadImages(images)


class SharedPrefix(NamedTuple):
    """A common prefix of some prompts of a batch."""

    ids: list[int]
    images: Tensor | ReadImages  # of these prompts
    rows: list[int]  # indices of the prompts


def find_shared_prefixes(
    prompts: Sequence[Sequence[int]], images: Sequence[Tensor | ReadImages]
) -> list[SharedPrefix]:
    """Group prompts by their images and find the common prefix of each group.

    A prefix is shorter than every prompt of its group: the last id must be an input, to predict the next one.
    """
    # compare contents, not objects: callers may encode the same image several times
    groups: dict[Any, list[int]] = {}
    for i, entry in enumerate(map(_as_read, images)):
        tensors = (entry.codes, entry.features)
        key = [(tuple(t.shape), t.cpu().numpy().tobytes()) for t in tensors if t is not None]
        groups.setdefault(tuple(key), []).append(i)
    prefixes = []
    for rows in groups.values():
        first = list(prompts[rows[0]])
        length = min(len(prompts[i]) for i in rows) - 1
        for i in rows[1:]:
            differing = (j for j in range(length) if prompts[i][j] != first[j])
            length = next(differing, length)
        prefixes.append(SharedPrefix(first[:length], images[rows[0]], rows))
    return prefixes


def shared_prefixes(
    model: Any, prompts: Sequence[Sequence[int]], images: Sequence[Tensor | ReadImages]
) -> list[SharedPrefix]:
    """The common prefixes of prompts about the same images; empty if there is nothing to share."""
    prefixes = find_shared_prefixes(prompts, images)
    # as many groups as prompts: nothing to share
    return prefixes if len(prefixes) < len(prompts) and can_share(model, prompts, prefixes) else []


def can_share(model: Any, prompts: Sequence[Sequence[int]], prefixes: Sequence[SharedPrefix]) -> bool:
    """True if all images are within the prefixes and every layer attends to its whole past.

    The padding between prefix and rest would shift a sliding window.
    """
    image_ids = {model.config.image_token_id, model.config.feature_token_id}
    rests = (prompts[row][len(prefix.ids) :] for prefix in prefixes for row in prefix.rows)
    if any(not image_ids.isdisjoint(rest) for rest in rests):
        return False
    layer_types = getattr(model.config.text_config, "layer_types", None) or []
    return all(prefix.ids for prefix in prefixes) and all(kind == "full_attention" for kind in layer_types)
