"""Drawing images code by code from batches of prompts, with every cache kept (arXiv 2502.20321, section 3.3).

B images, R rows of the batch (B, or 2B under guidance: conditional rows, then unconditional ones), N visual
tokens per image, K sub-codebooks, V entries per sub-codebook, L prompt length, D decoder width.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from open_unitok.core.errors import UserError

from .backends.cuda_graph import Position, can_fix
from .backends.eager import check_weights, start
from .sampling import Noise, Sampling, choose, guide
from .validation import check_prompts


def generate_image_codes(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int],
    unconditional_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
    prefix: Tensor | None = None,
    weights: str | None = None,
) -> Tensor:
    """Codes (B, N, K) of one image per prompt, all drawn side by side.

    Args:
        model: a `UniTokForConditionalGeneration`.
        prompt_ids: B lists of ids of any lengths, each ending in boi; equal ones are read once.
        seeds: B seeds; an image's codes depend on its own alone, not on the rest of the batch.
        unconditional_ids: the prompt that guidance leads away from, one for all or one per prompt; needed
            where guidance is not 1.
        prefix: (B, n, K) or (1, n, K) codes with which the images begin, 0 <= n < N.
        weights: None = as the model has them; "int8" = rounded to 8 bits, a scale a row, on a CPU.

    Raises:
        UserError: an empty or over-long prompt, a wrong seed, guidance without unconditional_ids, a prefix of
            another shape or range.
    """
    codes = torch.empty(0)
    for codes in iter_image_codes(model, prompt_ids, sampling, seeds, unconditional_ids, prefix, weights):  # noqa: B007
        pass
    return codes


def iter_image_codes(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int],
    unconditional_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
    prefix: Tensor | None = None,
    weights: str | None = None,
) -> Iterator[Tensor]:
    """Yield the codes so far (B, t, K) after each visual token t = n+1..N; else as `generate_image_codes`.

    Wrong arguments are refused by the call itself, not by the first step. Every step yields a view of one
    tensor, which is filled further: copy it to keep it as it was.
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
    check_weights(model, weights)
    if not images:
        return iter([codes])
    return _draw(model, [*prompt_ids, *(free or [])], sampling, noise, codes, given, weights)


@torch.no_grad()
def _draw(
    model: Any,
    rows: list[Sequence[int]],
    sampling: Sampling,
    noise: Noise | None,
    codes: Tensor,
    given: int,
    weights: str | None,
) -> Iterator[Tensor]:
    engine = start(model, rows, codes[:, :given], weights)
    guidances, position = sampling.guidances(codes.shape[1]), None
    for t in range(codes.shape[1]):
        gumbel = noise.draw() if noise else None  # of given places too: the rest is drawn as without a prefix
        if t < given:
            continue
        if position is not None:
            position.run(gumbel)
        else:
            if t > given:
                engine.decode_step(codes[:, t - 1])
            draw_visual_token(engine, sampling, guidances[t], gumbel, codes[:, t])
            if t == given and can_fix(engine, codes.shape[1] - t - 1):
                draw = functools.partial(_draw_visual_token, sampling)
                position = Position(engine, codes, guidances, gumbel, draw)
                position.capture()
        yield codes[:, : t + 1]


def _draw_visual_token(sampling: Sampling, engine: Any, *rest: Any) -> None:
    draw_visual_token(engine, sampling, *rest)


def draw_visual_token(
    engine: Any, sampling: Sampling, guidance: float | Tensor, noise: Tensor | None, codes: Tensor
) -> None:
    """Choose the K codes of one visual token and write them into `codes` (B, K), one after the other.

    Args:
        engine: see engine.py; it stands at this visual token.
        guidance: at this visual token.
        noise: (K, B, V), or None where greedy.
    """
    guided = engine.copies == 2
    chosen = None
    for k in range(codes.shape[1]):
        logits = engine.logits(k, chosen).float()
        if guided:
            logits = guide(logits, guidance)
        chosen = choose(logits, sampling, None if noise is None else noise[k])
        codes[:, k] = chosen


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
    check_prefix(prefix, len(codes), model.config)
    model.visual_embedder.check_codes(prefix)
    codes[:, : prefix.shape[1]] = prefix
    return prefix.shape[1]


def check_prefix(prefix: Any, images: int, config: Any) -> None:
    """
    Raises:
        UserError: it is no tensor, or of another shape than so many images begin with.
    """
    shape, tokens = tuple(getattr(prefix, "shape", ())), config.num_image_tokens
    if not isinstance(prefix, Tensor) or len(shape) != 3 or shape[0] not in (1, images) or shape[1] >= tokens:
        raise UserError(
            f"prefix has shape {shape}; a tensor of (1 or {images} images, at most {tokens - 1} visual "
            f"tokens, {config.num_codebooks} sub-codebooks) is needed."
        )
