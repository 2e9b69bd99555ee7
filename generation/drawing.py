"""Drawing images code by code from batches of prompts, with every cache kept (arXiv 2502.20321, section 3.3).

B images, R rows of the batch (B, or 2B under guidance: conditional rows, then unconditional ones), N visual
tokens per image, K sub-codebooks, V entries per sub-codebook, L prompt length, D decoder width.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from open_unitok.errors import UserError

from .decoder import context_length, read_prompts
from .sampling import Noise, Sampling, choose, guide


def draw_codes(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int],
    unconditional_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
    prefix: Tensor | None = None,
) -> Tensor:
    """Codes (B, N, K) of one image per prompt, all drawn side by side.

    Args:
        model: a `UniTokForConditionalGeneration`.
        prompt_ids: B lists of ids of any lengths, each ending in boi; equal ones are read once.
        seeds: B seeds; an image's codes depend on its own alone, not on the rest of the batch.
        unconditional_ids: the prompt that guidance leads away from, one for all or one per prompt; needed
            where guidance is not 1.
        prefix: (B, n, K) or (1, n, K) codes with which the images begin, 0 <= n < N.

    Raises:
        UserError: an empty or over-long prompt, a wrong seed, guidance without unconditional_ids, a prefix of
            another shape or range.
    """
    codes = torch.empty(0)
    for codes in draw_steps(model, prompt_ids, sampling, seeds, unconditional_ids, prefix):  # noqa: B007
        pass
    return codes


@torch.no_grad()
def draw_steps(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int],
    unconditional_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
    prefix: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield the codes so far (B, t, K) after each visual token t = n+1..N; else as `draw_codes`.

    Every step yields a view of one tensor, which is filled further: copy it to keep it as it was.
    """
    config = model.config
    guided = sampling.guidance != 1
    check_prompts(prompt_ids, seeds, config)
    images, count, books = len(prompt_ids), config.num_image_tokens, config.num_codebooks
    free = unconditional_rows(unconditional_ids, images, config) if guided else []
    if guided and free is None:
        raise UserError(
            f"guidance = {sampling.guidance} needs unconditional_ids; guidance = 1 draws without."
        )
    codes = torch.zeros(images, count, books, dtype=torch.long, device=model.device)
    given = 0 if prefix is None else fill_prefix(model, codes, prefix)
    noise = None if sampling.greedy else Noise(seeds, books, config.codebook_size, model.device)
    if not images:
        yield codes
        return
    decoder = read_prompts(model, [*prompt_ids, *(free or [])], room=count - 1)
    embedder_cache = model.visual_embedder.new_cache(count)
    hidden, guidances = decoder.hidden, sampling.guidances(count)
    for t in range(count):
        gumbel = noise.draw() if noise else None  # of given places too: the rest is drawn as without a prefix
        if t < given:
            continue
        if t:
            new = codes[:, t - 1 : t] if t > given else codes[:, :t]
            vectors = model.visual_embedder.step(new, embedder_cache).to(hidden.dtype)
            hidden = decoder.step(vectors.repeat(2, 1, 1) if guided else vectors)
        draw_visual_token(model.depth_head, hidden, sampling, guidances[t], gumbel, codes[:, t])
        yield codes[:, : t + 1]


def draw_visual_token(
    head: Any, hidden: Tensor, sampling: Sampling, guidance: float, noise: Tensor | None, codes: Tensor
) -> None:
    """Choose the K codes of one visual token and write them into `codes` (B, K), one depth step per code.

    Args:
        hidden: (R, D) decoder states that predict this visual token.
        guidance: at this visual token.
        noise: (K, B, V), or None where greedy.
    """
    guided = len(hidden) != len(codes)
    cache = head.new_cache()
    entry = hidden
    for k in range(codes.shape[1]):
        logits = head.step(k, entry, cache).float()
        if guided:
            logits = guide(logits, guidance)
        chosen = choose(logits, sampling, None if noise is None else noise[k])
        codes[:, k] = chosen
        entry = chosen.repeat(2) if guided else chosen


def check_prompts(
    prompt_ids: Sequence[Sequence[int]], seeds: Sequence[int], config: Any, name: str = "Prompt"
) -> None:
    """
    Raises:
        UserError: not one seed per prompt, an empty prompt, or one that leaves no room for the image.
    """
    if len(seeds) != len(prompt_ids):
        raise UserError(f"{len(seeds)} seeds for {len(prompt_ids)} prompts: give one seed per prompt.")
    limit = context_length(config)
    for i, row in enumerate(prompt_ids):
        if not len(row):
            raise UserError(f"{name} {i} is empty: write what to draw.")
        if limit is not None and len(row) + config.num_image_tokens > limit:
            raise UserError(
                f"{name} {i} has {len(row)} tokens and its image {config.num_image_tokens}, more than the "
                f"model's context of {limit}: shorten the prompt to {limit - config.num_image_tokens} tokens."
            )


def unconditional_rows(
    ids: Sequence[int] | Sequence[Sequence[int]] | None, images: int, config: Any
) -> list[Sequence[int]] | None:
    """One row of ids per image.

    Raises:
        UserError: neither one row nor one per image; an empty or over-long one.
    """
    if ids is None:
        return None
    rows: list[Any] = list(ids) if any(isinstance(row, Sequence) for row in ids) else [ids]
    if len(rows) not in (1, images):
        raise UserError(f"{len(rows)} negative prompts for {images} prompts: give one, or one per prompt.")
    check_prompts(rows, [0] * len(rows), config, "Negative prompt")
    return rows if len(rows) == images else rows * images


def fill_prefix(model: Any, codes: Tensor, prefix: Tensor) -> int:
    """Write the given codes into the head of `codes` (B, N, K); their number n.

    Raises:
        UserError: they are of another shape or range, or nothing is left to draw.
    """
    if prefix.dim() != 3 or prefix.shape[0] not in (1, len(codes)) or prefix.shape[1] >= codes.shape[1]:
        raise UserError(
            f"prefix has shape {tuple(prefix.shape)}; (1 or {len(codes)} images, at most "
            f"{codes.shape[1] - 1} visual tokens, {codes.shape[2]} sub-codebooks) is needed."
        )
    model.visual_embedder.check_codes(prefix)
    codes[:, : prefix.shape[1]] = prefix
    return prefix.shape[1]
