"""Drawing images code by code from batches of prompts, with every cache kept (arXiv 2502.20321, section 3.3).

B images, R rows of the batch (B, or 2B under guidance: conditional rows, then unconditional ones), N visual
tokens per image, K sub-codebooks, V entries per sub-codebook, L prompt length, D decoder width.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from open_unitok.errors import UserError

from .sampling import Noise, Sampling, choose, guide


def draw_codes(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int],
    unconditional_ids: Sequence[int] | None = None,
) -> Tensor:
    """Codes (B, N, K) of one image per prompt, all drawn side by side.

    Args:
        model: a `UniTokForConditionalGeneration`.
        prompt_ids: B lists of ids of any lengths, each ending in boi.
        seeds: B seeds; an image's codes depend on its own alone, not on the rest of the batch.
        unconditional_ids: the prompt of the unconditional rows; needed where guidance is not 1.

    Raises:
        UserError: an empty or over-long prompt, a wrong seed, guidance without unconditional_ids.
    """
    codes = torch.empty(0)
    for codes in draw_steps(model, prompt_ids, sampling, seeds, unconditional_ids):  # noqa: B007
        pass
    return codes


@torch.no_grad()
def draw_steps(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int],
    unconditional_ids: Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """Yield the codes so far (B, t, K) after each visual token t = 1..N; else as `draw_codes`.

    Every step yields a view of one tensor, which is filled further: copy it to keep it as it was.
    """
    config = model.config
    guided = sampling.guidance != 1
    check_prompts(prompt_ids, seeds, config)
    if guided and unconditional_ids is None:
        raise UserError(
            f"guidance = {sampling.guidance} needs unconditional_ids; guidance = 1 draws without."
        )
    count, books = config.num_image_tokens, config.num_codebooks
    noise = None if sampling.greedy else Noise(seeds, books, config.codebook_size, model.device)
    codes = torch.zeros(len(prompt_ids), count, books, dtype=torch.long, device=model.device)
    if not len(prompt_ids):
        yield codes
        return
    rows = [*prompt_ids, *([unconditional_ids] * len(prompt_ids) if guided else [])]
    decoder = read_prompts(model, rows, room=count - 1)
    embedder_cache = model.visual_embedder.new_cache(count)
    hidden = decoder.hidden
    for t in range(count):
        if t:
            new = codes[:, t - 1 : t]
            vectors = model.visual_embedder.step(new, embedder_cache).to(hidden.dtype)
            hidden = decoder.step(vectors.repeat(2, 1, 1) if guided else vectors)
        draw_visual_token(model.depth_head, hidden, sampling, noise.draw() if noise else None, codes[:, t])
        yield codes[:, : t + 1]


def draw_visual_token(
    head: Any, hidden: Tensor, sampling: Sampling, noise: Tensor | None, codes: Tensor
) -> None:
    """Choose the K codes of one visual token and write them into `codes` (B, K), one depth step per code.

    Args:
        hidden: (R, D) decoder states that predict this visual token.
        noise: (K, B, V), or None where greedy.
    """
    guided = len(hidden) != len(codes)
    cache = head.new_cache()
    entry = hidden
    for k in range(codes.shape[1]):
        logits = head.step(k, entry, cache).float()
        if guided:
            logits = guide(logits, sampling.guidance)
        chosen = choose(logits, sampling, None if noise is None else noise[k])
        codes[:, k] = chosen
        entry = chosen.repeat(2) if guided else chosen


def read_prompts(model: Any, rows: Sequence[Sequence[int]], room: int) -> "Decoder":
    """A decoder that has read R prompts of text ids, equal ones once, and goes on for up to `room` steps."""
    place = {row: i for i, row in enumerate(dict.fromkeys(map(tuple, rows)))}
    ids, mask = pad_left(list(place), model.config.pad_token_id or 0, model.device)
    select = torch.tensor([place[tuple(row)] for row in rows], device=model.device)
    return Decoder(model.language_model, model.get_input_embeddings()(ids), mask, select, room)


class Decoder:
    """The language model behind its KV cache: left-padded inputs once, then one vector per row and step.

    Args:
        embeds: (U, L, D) inputs, left-padded; mask: (U, L) int64, 0 on padding.
        select: (R,) the row of `embeds` that each row goes on from. So equal rows are read once and their
            cache is copied: the unconditional rows, many images of one prompt.
        room: how many steps will follow at most.

    Attributes:
        hidden: (R, D) states at the last place of the inputs.
    """

    def __init__(self, language_model: Any, embeds: Tensor, mask: Tensor, select: Tensor, room: int):
        self.language_model = language_model
        self.length = mask.shape[1]
        padded = bool((mask == 0).any())  # without padding no mask is needed, which is faster
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=language_model.config)
        states = language_model(
            inputs_embeds=embeds,
            attention_mask=mask if padded else None,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        self.hidden = states[select, -1]
        self.cache = spread(cache, select, room)
        self.positions = positions[select, -1:]
        self.mask = torch.cat([mask[select], mask.new_ones(len(select), room)], dim=1) if padded else None

    def step(self, vectors: Tensor) -> Tensor:
        """(R, 1, D) inputs at the next place -> (R, D) states there."""
        self.length += 1
        self.positions = self.positions + 1
        return self.language_model(
            inputs_embeds=vectors,
            attention_mask=None if self.mask is None else self.mask[:, : self.length],
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer with room for the steps to come, which write and copy nothing else."""

    def __init__(self, layer: DynamicLayer, select: Tensor, room: int):
        super().__init__()
        assert layer.keys is not None and layer.values is not None
        self.lazy_initialization(layer.keys, layer.values)
        self.buffers = [_with_room(x, select, room) for x in (layer.keys, layer.values)]
        self._show(layer.keys.shape[2])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write (R, heads, n, width) behind what is there; return all that is there."""
        assert self.keys is not None
        start, new = self.keys.shape[2], key_states.shape[2]
        self.buffers[0][:, :, start : start + new] = key_states
        self.buffers[1][:, :, start : start + new] = value_states
        return self._show(start + new)

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (x[:, :, :length] for x in self.buffers)
        return self.keys, self.values


def _with_room(states: Tensor, select: Tensor, room: int) -> Tensor:
    _, heads, length, width = states.shape
    buffer = states.new_empty(len(select), heads, length + room, width)
    buffer[:, :, :length] = states[select]
    return buffer


def spread(cache: Cache, select: Tensor, room: int) -> Cache:
    """The cache with its rows `select`ed (repeats allowed) and room for `room` more places."""
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = RoomyLayer(layer, select, room)
        else:  # sliding windows and the like grow as transformers has it
            layer.batch_select_indices(select)  # type: ignore[attr-defined]
    return cache


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Ids (R, L) and mask (R, L) int64; the mask comes from the lengths: a genuine pad id stays visible."""
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def context_length(config: Any) -> int | None:
    """The decoder's context in tokens, visual ones included; None where its config names none."""
    return getattr(config.text_config, "max_position_embeddings", None)


def check_prompts(prompt_ids: Sequence[Sequence[int]], seeds: Sequence[int], config: Any) -> None:
    """
    Raises:
        UserError: not one seed per prompt, an empty prompt, or one that leaves no room for the image.
    """
    if len(seeds) != len(prompt_ids):
        raise UserError(f"{len(seeds)} seeds for {len(prompt_ids)} prompts: give one seed per prompt.")
    limit = context_length(config)
    for i, row in enumerate(prompt_ids):
        if not len(row):
            raise UserError(f"Prompt {i} is empty: write what to draw.")
        if limit is not None and len(row) + config.num_image_tokens > limit:
            raise UserError(
                f"Prompt {i} has {len(row)} tokens and its image {config.num_image_tokens}, more than the "
                f"model's context of {limit}: shorten the prompt to {limit - config.num_image_tokens} tokens."
            )
