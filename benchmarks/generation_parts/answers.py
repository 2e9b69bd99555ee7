"""Answers of benchmarks/generation.py: questions about images, batched, one by one, and by transformers."""

import time
from typing import Any

import torch
from harness import best_seconds
from torch import nn

from open_unitok.generation import generate_text_ids

from .model import benchmark_model, make_questions, weights_per_token
from .peers import answer_by_transformers

# name -> (images that the questions are about, new tokens each)
ANSWER_CASES = {"photos": (32, 16), "dialogues": (8, 32)}
TOY_CASES = {"photos": (4, 2), "dialogues": (1, 3)}
QUESTIONS, TOY_QUESTIONS = 32, 4
# not compiled: prompts of another length are another graph
STATIC = {"cache_implementation": "static", "disable_compile": True}


def measure_answers(toy: bool = False) -> dict[str, Any]:
    """Seconds for 32 questions of mixed lengths: batched, one by one, and by transformers'
    `generate` in both ways and with a static cache; and the share of equal ids.

    One by one is measured on every fourth question, times four. "photos": every question about its own image,
    16 new tokens. "dialogues": four questions per image, 32 new tokens. Floors: the multiplications of the
    batch at this run's GFLOP/s.
    """
    model, found = benchmark_model(toy), {}
    decoder, embedder, _ = weights_per_token(model)
    x, w = torch.randn(256, 1024), torch.randn(3072, 1024)
    rate = 2 * 256 * 1024 * 3072 / best_seconds(lambda: nn.functional.linear(x, w), 30)
    questions = TOY_QUESTIONS if toy else QUESTIONS
    for name, (images, new_tokens) in (TOY_CASES if toy else ANSWER_CASES).items():
        prompts, codes = make_questions(questions, images, toy)
        # way -> (every how many questions, rows of a batch, function, options)
        ways: dict[str, tuple[int, int, Any, dict[str, Any]]] = {
            "batched": (1, questions, generate_text_ids, {}),
            "one_by_one": (4, 1, generate_text_ids, {}),
            "transformers_batched": (1, questions, answer_by_transformers, {}),
            "transformers_static_batched": (1, questions, answer_by_transformers, STATIC),
            "transformers_one_by_one": (4, 1, answer_by_transformers, {}),
            "transformers_static_one_by_one": (4, 1, answer_by_transformers, STATIC),
        }
        seconds: dict[str, float] = {}
        answers: dict[str, list[list[int]]] = {}
        for way, (every, size, answer, options) in ways.items():
            answers[way], start = [], time.perf_counter()
            for i in range(0, questions, every * size):
                rows = slice(i, i + size)
                answers[way] += answer(model, prompts[rows], codes[rows], new_tokens, **options)
            seconds[way] = every * (time.perf_counter() - start)
        # prefill reads an image once for all its questions; the last new token needs no decode step
        visual = len(codes[0][0])
        read = images * visual * (decoder + embedder) + sum(len(p) - visual for p in prompts) * decoder
        written = questions * (new_tokens * model.lm_head.weight.numel() + (new_tokens - 1) * decoder)
        reference = answers["batched"]
        found[name] = {f"{way}_s": once for way, once in seconds.items()} | {
            "same_ids": {way: share_equal(ids, reference) for way, ids in answers.items()},
            "prefill_floor_s": 2 * read / rate,
            "decode_floor_s": 2 * written / rate,
        }
    return found


def share_equal(ids: list[list[int]], reference: list[list[int]]) -> float:
    """Share of equal ids; of every fourth answer where there are no others."""
    step = len(reference) // len(ids)
    pairs = [(a, b) for row, other in zip(ids, reference[::step]) for a, b in zip(row, other)]
    return sum(a == b for a, b in pairs) / len(pairs)


def measure_prefix(toy: bool = False) -> dict[str, Any]:
    """Seconds for four questions about one image, 4 new tokens each, with and without a shared prefix."""
    model = benchmark_model(toy)
    prompts, codes = make_questions(4, 1, toy)

    def one_by_one() -> None:
        for prompt, image_codes in zip(prompts, codes):
            generate_text_ids(model, [prompt], [image_codes], 4, share_prefix=False)

    return {
        "shared_s": best_seconds(lambda: generate_text_ids(model, prompts, codes, 4)),
        "batched_s": best_seconds(lambda: generate_text_ids(model, prompts, codes, 4, share_prefix=False)),
        "one_by_one_s": best_seconds(one_by_one),
    }
