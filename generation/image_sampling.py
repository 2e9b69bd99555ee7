"""Autoregressive image generation: codes for batches of prompts, with KV caches (arXiv 2502.20321, section
3.4).

B images, R rows of the batch (B, or 2B under guidance: conditional rows, then unconditional ones), N visual
tokens per image, K sub-codebooks, V entries per sub-codebook, L prompt length, D decoder width.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from open_unitok.core.codes import as_int64
from open_unitok.core.errors import UserError
from open_unitok.mllm.loading import check_logits
from open_unitok.mllm.visual_embedder import check_image_codes

from .backends import Backend, choose_backend, open_backend
from .sampling import GumbelNoise, Sampling, apply_guidance, sample_code
from .validation import check_prefix, check_prompts


def generate_image_codes(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int],
    unconditional_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
    prefix: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Codes (B, N, K) of one image per prompt, all in one batch.

    Args:
        model: a `UniTokForConditionalGeneration`, or a `ClassConditionalModel` with prompts of one class
            each.
        prompt_ids: B lists of ids of any lengths, each ending in boi; equal ones are prefilled once.
        seeds: B seeds; the codes of an image depend only on its own seed, not on the rest of the batch.
        unconditional_ids: the unconditional or negative prompt, one for all or one per prompt; required if
            guidance is not 1.
        prefix: (B, n, K) or (1, n, K) codes of the first n visual tokens, 0 <= n < N.
        backend: see `choose_backend`.

    Raises:
        UserError: an empty or over-long prompt, a seed out of range, guidance without unconditional_ids, a
            prefix of another shape or range, a backend that cannot run the model.
    """
    codes = torch.empty(0)
    for codes in iter_image_codes(  # noqa: B007
        model, prompt_ids, sampling, seeds, unconditional_ids, prefix, backend
    ):
        pass
    return codes


def iter_image_codes(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int],
    unconditional_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
    prefix: Tensor | None = None,
    backend: str = "auto",
) -> Iterator[Tensor]:
    """Yield the codes so far (B, t, K) after each visual token t = n+1..N; else as `generate_image_codes`.

    Arguments are checked by the call itself, not by the first step. Every step yields a view of the same
    tensor: clone it to keep it.
    """
    config = model.config
    config.check_generates()
    check_prompts(prompt_ids, seeds, config)
    images, num_tokens, books = len(prompt_ids), config.num_image_tokens, config.num_codebooks
    # guidance 1 is the conditional distribution: half the rows
    unconditional = _unconditional_rows(unconditional_ids, images, config) if sampling.guidance != 1 else []
    if unconditional is None:
        without_null = hasattr(config, "null_class")  # a class-conditional model
        needed = "class_dropout above 0 in training (a null class)" if without_null else "unconditional_ids"
        raise UserError(f"guidance = {sampling.guidance} needs {needed}; guidance = 1 generates without.")
    codes = torch.zeros(images, num_tokens, books, dtype=torch.long, device=model.device)
    num_given = 0
    if prefix is not None:  # one for all images is broadcast
        check_prefix(prefix, images, config)
        prefix = as_int64(prefix)
        assert prefix is not None
        check_image_codes(prefix, config.book_sizes)
        num_given = prefix.shape[1]
        codes[:, :num_given] = prefix
    noise = None if sampling.greedy else GumbelNoise(seeds, books, config.codebook_size, model.device)
    chosen = choose_backend(model, backend, num_steps=num_tokens - num_given - 1)
    if not images:
        return iter([codes])
    # conditional rows first: `apply_guidance` splits the logits into halves
    rows = [*prompt_ids, *unconditional]
    check = functools.partial(check_logits, model=model)
    opened = open_backend(model, chosen, rows, images, sampling)
    return _iter_codes(opened, rows, sampling, noise, codes, num_given, check)


@torch.no_grad()
def _iter_codes(
    opened: AbstractContextManager[Backend],
    rows: Sequence[Sequence[int]],
    sampling: Sampling,
    noise: GumbelNoise | None,
    codes: Tensor,
    num_given: int,
    check: Callable[[Tensor], None],
) -> Iterator[Tensor]:
    """Fill `codes` (B, N, K) from visual token `num_given` on; `check` takes the logits of the first one."""
    with opened as backend:
        # tensors on the device: a CUDA graph would capture Python numbers as constants
        guidances = torch.tensor(sampling.guidances(codes.shape[1]), device=codes.device)
        guidances = backend.keep("guidances", guidances)
        # of the visual token that is sampled next, and the codes of the one sampled last
        index = backend.keep("index", torch.full((1,), num_given, device=codes.device))
        last = backend.keep("last", codes[:, 0].clone())
        gumbel = None
        if noise:
            noise.noise = backend.keep("noise", noise.noise)
            for _ in range(num_given + 1):  # the given tokens' noise is skipped: the rest as without a prefix
                gumbel = noise.sample()

        def sample_token(check: Callable[[Tensor], None] | None = None) -> None:
            sample_visual_token(backend, sampling, guidances.index_select(0, index), gumbel, last, check)
            index.add_(1)

        def step() -> None:  # reads and writes tensors of fixed address, so that a CUDA graph can replay it
            backend.decode_step(last)
            sample_token()

        backend.prefill(rows, codes[:, :num_given])
        # only the first visual token: the check waits for the device, and a captured graph cannot
        sample_token(check)
        codes[:, num_given] = last
        yield codes[:, : num_given + 1]
        fast_step = backend.compile_step(step, [index, last]) if num_given + 1 < codes.shape[1] else step
        for t in range(num_given + 1, codes.shape[1]):
            if noise:
                noise.sample()  # refills the tensor `gumbel`
            fast_step()
            codes[:, t] = last
            yield codes[:, : t + 1]


def sample_visual_token(
    backend: Backend,
    sampling: Sampling,
    guidance: float | Tensor,
    noise: Tensor | None,
    codes: Tensor,
    check: Callable[[Tensor], None] | None = None,
) -> None:
    """Sample the K codes of one visual token autoregressively into `codes` (B, K).

    Args:
        backend: after `prefill` and the decode steps of all earlier visual tokens.
        guidance: scale at this visual token; a number or (1,).
        noise: (K, B, V), or None if greedy.
        check: called with the logits (R, V) of each code.
    """
    code = None
    for k in range(codes.shape[1]):
        logits = backend.code_logits(k, code).float()
        if check is not None:
            check(logits)
        if backend.rows_per_image == 2:
            logits = apply_guidance(logits, guidance)
        code = sample_code(logits, sampling, None if noise is None else noise[k])
        codes[:, k] = code


def _unconditional_rows(
    ids: Sequence[int] | Sequence[Sequence[int]] | None, images: int, config: Any
) -> list[Sequence[int]] | None:
    """One row of ids per image.

    Raises:
        UserError: neither one row nor one per image; a row is empty or too long.
    """
    if ids is None:
        return None
    # one flat list of ids, or a list of such lists
    rows: list[Any] = list(ids) if any(isinstance(row, Sequence) for row in ids) else [ids]
    if len(rows) not in (1, images):
        raise UserError(f"{len(rows)} negative prompts for {images} prompts: give one, or one per prompt.")
    check_prompts(rows, [0] * len(rows), config, "Negative prompt")
    return rows if len(rows) == images else rows * images
