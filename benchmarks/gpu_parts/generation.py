"""Speed: images and answers of the published 7B in bf16 with random weights, against the bandwidth floor.

The floor of a decode step is the time to read every weight that it needs once, and the filled part of the KV
cache, at the bandwidth that this device reads with.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from generation_parts.model import (
    GUIDANCE,
    UNCONDITIONAL,
    benchmark_model,
    image_prompts,
    make_questions,
    weights_per_token,
)
from harness import best_seconds, measure_seconds

from open_unitok import UniTokForConditionalGeneration, UniTokMLLMConfig
from open_unitok.generation import Sampling, generate_image_codes, generate_text_ids, iter_image_codes
from open_unitok.generation.backends import captured_step, choose_backend
from open_unitok.generation.sampling import GumbelNoise

from .budgets import beside_budget
from .report import Report, count_waits, peak_gib, random_weights

BATCHES = (1, 16, 64)
EAGER_TOKENS = 24  # of the loop without a graph, which is slow
NEW_TOKENS = 33  # the first one comes from the prefill


def run(report: Report) -> None:
    """Rows per batch: images, images without a graph, answers."""
    model: Any = None

    def build() -> dict[str, Any]:
        nonlocal model
        if report.toy:
            model = benchmark_model(toy=True).to(report.device, torch.bfloat16)
        else:
            config = UniTokMLLMConfig.named("unitok_mllm_7b")
            model = random_weights(
                lambda: UniTokForConditionalGeneration(config), report.device, torch.bfloat16
            )
        # answers must not end early
        model.generation_config.eos_token_id = model.config.eos_token_id = None
        return {"parameters": sum(p.numel() for p in model.parameters())}

    if not report.row("build", build):
        return
    model.eval()
    bandwidth = read_bandwidth(report)
    for images in BATCHES:
        report.row(f"images, batch {images}", measure_images, report, model, images, bandwidth, need=15.0)
    for questions in (1, BATCHES[-1]):
        for backend in ("auto", "torch"):
            name = f"answers, batch {questions}{', transformers' * (backend == 'torch')}"
            report.row(name, measure_answers, report, model, questions, backend, bandwidth, need=10.0)
    report.row("images, batch 1, without a graph", measure_eager, report, model, need=10.0)


def read_bandwidth(report: Report) -> float:
    """Bytes per second of a sum over 2 GiB."""
    numbers = torch.ones(2**14 if report.toy else 2**29, device=report.device)
    return 4 * numbers.numel() / best_seconds(numbers.sum, 10, report.device)


def cache_bytes(model: Any, rows: int, length: float) -> float:
    """Bytes of the KV cache of `rows` rows of `length` tokens."""
    text = model.config.text_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = text.num_key_value_heads or text.num_attention_heads
    return 2.0 * model.dtype.itemsize * rows * length * text.num_hidden_layers * heads * head


@contextlib.contextmanager
def time_captures() -> Iterator[list[float]]:
    """Seconds of every capture of a graph."""
    found: list[float] = []
    original = captured_step.capture_step

    def timed(*args: Any, **kwargs: Any) -> Callable[[], None]:
        start = time.perf_counter()
        replay = original(*args, **kwargs)  # it waits for the device itself
        found.append(time.perf_counter() - start)
        return replay

    captured_step.capture_step = timed
    try:
        yield found
    finally:
        captured_step.capture_step = original


def measure_images(report: Report, model: Any, images: int, bandwidth: float) -> dict[str, Any]:
    """Milliseconds per visual token over the floor; what capture and noise take; waits of the host."""
    images = min(images, 2) if report.toy else images
    prompts = image_prompts(images)
    sampling, tokens = Sampling(guidance=GUIDANCE), model.config.num_image_tokens

    def generate() -> torch.Tensor:
        return generate_image_codes(model, prompts, sampling, range(images), UNCONDITIONAL)

    with time_captures() as captures, count_waits(report.device) as waits:
        first = measure_seconds(generate, report.device)
    # a later batch finds its graph kept
    with time_captures() as later:
        seconds = measure_seconds(generate, report.device)
    noise = GumbelNoise(
        list(range(images)), model.config.num_codebooks, model.config.codebook_size, report.device
    )
    noise_seconds = tokens * report.seconds(noise.sample, 20)
    read = 2.0 * sum(weights_per_token(model))
    length = len(prompts[0]) + tokens / 2
    floor = (read + cache_bytes(model, 2 * images, length)) / bandwidth
    step = seconds / tokens
    backend = choose_backend(model, num_steps=tokens - 1)
    row = {"backend": backend, "captures": len(captures), "captures_of_a_later_batch": len(later)}
    return {**row, **beside_budget("images of 7B", len(waits))} | report.measured(
        ms_per_token=1000 * step,
        over_floor=step / floor,
        floor_ms=1000 * floor,
        seconds_per_image=seconds / images,
        images_per_second=images / seconds,
        share_of_capture=sum(captures) / first,
        share_of_noise=noise_seconds / seconds,
        peak_gib=peak_gib(report.device),
    )


def measure_eager(report: Report, model: Any) -> dict[str, Any]:
    """Milliseconds per visual token of the modules themselves, launched one kernel after the other."""
    tokens = min(EAGER_TOKENS, model.config.num_image_tokens)

    def generate() -> None:
        sampling = Sampling(guidance=GUIDANCE)
        steps = iter_image_codes(model, image_prompts(1), sampling, [0], UNCONDITIONAL, backend="torch")
        for _ in range(tokens):
            next(steps)

    return report.measured(ms_per_token=1000 * report.seconds(generate, 2) / tokens)


def measure_answers(
    report: Report, model: Any, questions: int, backend: str, bandwidth: float
) -> dict[str, Any]:
    """Answers/s of 33 tokens about an image each, and milliseconds per token without the prefill."""
    questions = min(questions, 2) if report.toy else questions
    prompts, codes = make_questions(questions, questions, toy=report.toy)

    def answer(tokens: int) -> None:
        found = generate_text_ids(model, prompts, codes, tokens, backend=backend)
        if [len(row) for row in found] != [tokens] * questions:
            raise RuntimeError(f"answers of {[len(row) for row in found]} ids instead of {tokens}")

    with count_waits(report.device) as waits:
        answer(NEW_TOKENS)
    whole = report.seconds(lambda: answer(NEW_TOKENS), 2)
    prefill = report.seconds(lambda: answer(1), 2)
    step = (whole - prefill) / (NEW_TOKENS - 1)
    decoder, _, _ = weights_per_token(model)
    length = max(map(len, prompts)) + NEW_TOKENS / 2
    weights = 2.0 * (decoder + model.lm_head.weight.numel())
    floor = (weights + cache_bytes(model, questions, length)) / bandwidth
    return {"waits": len(waits), "new_tokens": NEW_TOKENS} | report.measured(
        answers_per_second=questions / whole,
        ms_per_token=1000 * step,
        over_floor=step / floor,
        prefill_ms=1000 * prefill,
    )
