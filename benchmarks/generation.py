"""Speed of image and text generation, each as a ratio to a baseline in the same run.

    python benchmarks/generation.py [--parts NAME ...] [--out FILE]      # about 10 minutes on two cores
    python benchmarks/generation.py --agreement MODEL   # codes of bf16 and int8 against fp32, teacher-forced
    python benchmarks/generation.py --gpu                                # the 7B shape on a CUDA device

Baseline of images: generation_baseline.py, the published sampling loop in eager PyTorch and float32, with
transformers' growing KV cache and the depth head recomputed on its prefix for every code. Baselines of
answers: one question at a time by this package, and by transformers' `generate`. Every part runs alone in its
own process and reports its peak memory. Model: hidden 512, intermediate 1376, 8 layers, 8 heads, vocabulary
32000, 8 x 4096 codes, depth head of 3 layers, 256 visual tokens, guidance 5, random weights, 2 threads.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from generation_baseline import iter_baseline_codes
from harness import (
    best_seconds,
    device_name,
    load_average,
    measure_seconds,
    processor_name,
    read_results,
    result_file,
    run_isolated,
    write_results,
)
from torch import nn

from open_unitok import Pipeline, UniTokForConditionalGeneration, UniTokMLLMConfig
from open_unitok.generation import Sampling, generate_image_codes, generate_text_ids, iter_image_codes
from open_unitok.generation.backends import BACKENDS, choose_backend
from open_unitok.generation.backends.cuda_graph import CudaGraph
from open_unitok.generation.backends.int8 import quantize_model
from open_unitok.generation.backends.native import Native
from open_unitok.generation.sampling import apply_guidance

PROMPT, UNCONDITIONAL = list(range(10, 30)), [1, 5, 6, 3]
GUIDANCE = 5.0
# part -> (images, precision, visual tokens); the baseline's time per token barely depends on the position
IMAGE_PARTS = {
    "baseline_1": (1, "baseline", 40),
    "fp32_1": (1, "fp32", 256),
    "bf16_1": (1, "bf16", 256),
    "int8_1": (1, "int8", 256),
    "eager_1": (1, "eager", 40),  # without the C++ backend
    "compiled_1": (1, "compiled", 64),  # torch.compile in its place; minutes to compile
    "compiled_bf16_1": (1, "compiled_bf16", 64),
    "baseline_8": (8, "baseline", 64),  # as many as the others, so that peak memory compares
    "fp32_8": (8, "fp32", 64),
    "bf16_8": (8, "bf16", 64),
    "int8_8": (8, "int8", 64),
}
# name -> (images that 32 questions are about, new tokens each)
ANSWER_CASES = {"photos": (32, 16), "dialogues": (8, 32)}
PARTS = ("machine", *IMAGE_PARTS, "answers", "prefix")


def main() -> None:
    """Run each part in its own process and print the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, metavar="PART")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # for the process of one part
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file of results; those of other parts in it are kept")
    parser.add_argument("--gpu", action="store_true", help="the 7B shape on a CUDA device")
    parser.add_argument("--agreement", metavar="MODEL", help="compare the precisions on a trained model")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.agreement:
        print(json.dumps(measure_agreement(args.agreement)))
    elif args.gpu:
        print(json.dumps(measure_gpu()))
    elif args.part:
        print(json.dumps(measure_part(args.part)))
    else:
        results = read_results(args.out) if args.out else {}
        for part in args.parts:
            print(f"{part} (load {load_average()}) ...", file=sys.stderr, flush=True)
            numbers = run_isolated(__file__, "--part", part, "--threads", str(args.threads))
            results[part] = numbers | {"load": load_average()}
            if args.out:
                write_results(args.out, results)
        print(report(results))


def measure_part(part: str) -> dict[str, Any]:
    """The results of one part."""
    if part in IMAGE_PARTS:
        return measure_images(*IMAGE_PARTS[part])
    return {"machine": measure_machine, "answers": measure_answers, "prefix": measure_prefix}[part]()


def benchmark_model() -> Any:
    """The benchmark's model with fixed random weights."""
    text = {
        "model_type": "llama", "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
        "num_attention_heads": 8, "vocab_size": 32000, "max_position_embeddings": 1024,
        "bos_token_id": 1, "eos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(1)
    return UniTokForConditionalGeneration(UniTokMLLMConfig(text_config=text)).eval()


def measure_machine() -> dict[str, Any]:
    """Read bandwidth of memory and last-level cache in GB/s, and fp32 GFLOP/s of a matrix product."""
    # 384 MiB, larger than any last-level cache; the first 16 MiB fit into it
    numbers = torch.ones(96 * 2**20)
    x, w = torch.randn(256, 1024), torch.randn(3072, 1024)
    return {
        "memory_gb_s": 4 * numbers.numel() / best_seconds(numbers.sum, 8) / 1e9,
        "cache_gb_s": 2**24 / best_seconds(numbers[: 2**22].sum, 60) / 1e9,
        "fp32_gflop_s": 2 * 256 * 1024 * 3072 / best_seconds(lambda: nn.functional.linear(x, w), 30) / 1e9,
        "cpu": f"{processor_name()}, {os.cpu_count()} cores",
    }


# ---- images ------------------------------------------------------------------------------------------------


def measure_images(images: int, precision: str, tokens: int) -> dict[str, Any]:
    """Milliseconds per visual token of greedy decoding with guidance, the codes, and peak memory in MB."""
    backend = "torch" if precision.startswith(("eager", "compiled")) else "auto"
    if precision.startswith("compiled"):
        BACKENDS["torch"] = Compiled
    model = benchmark_model()
    if precision.endswith("bf16"):
        model = model.to(torch.bfloat16)
    prompts = [[*PROMPT, i, 3] for i in range(images)]
    if precision == "baseline":
        steps = iter_baseline_codes(model, prompts, UNCONDITIONAL, GUIDANCE)
    else:
        sampling = Sampling(guidance=GUIDANCE, greedy=True)
        if precision == "int8":
            quantize_model(model)
        steps = iter_image_codes(model, prompts, sampling, [0] * images, UNCONDITIONAL, backend=backend)
    times, codes, backend_times = [], torch.empty(0), time_native_backend()
    for _ in range(tokens):
        start = time.perf_counter()
        codes = next(steps)
        times.append(1000 * (time.perf_counter() - start))
    # the first step includes the prefill; the first and last quarter of the others show growth with position
    quarter = max(1, (tokens - 1) // 4)
    first, last = statistics.median(times[1 : 1 + quarter]), statistics.median(times[-quarter:])
    return {
        "ms": statistics.median(times[1:]),
        "best_ms": min(times[1:]),
        "last_over_first": last / first,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "codes": codes[:, :40].tolist(),
        "weights": dict(zip(("decoder", "embedder", "depth"), weights_per_token(model))),
        "profile_ms": {name: statistics.median(ms) for name, ms in backend_times.items() if ms},
    }


class Compiled(CudaGraph):
    """The torch backend as a user would speed it up on a CPU: static caches, the whole step (decoder, K depth
    steps, sampling) under torch.compile."""

    def compile_step(self, step: Callable[[], None], counters: Sequence[torch.Tensor]) -> Callable[[], None]:
        return torch.compile(step, dynamic=False)


def time_native_backend() -> dict[str, list[float]]:
    """Milliseconds of each later call into the C++ backend: decode steps, and logits of one code."""
    times: dict[str, list[float]] = {"decode_step": [], "code_logits": []}

    def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            start = time.perf_counter()
            result = method(*args)
            times[name].append(1000 * (time.perf_counter() - start))
            return result

        return call

    for name in times:
        setattr(Native, name, timed(name, getattr(Native, name)))
    return times


def weights_per_token(model: Any) -> tuple[int, int, int]:
    """Weights read per visual token: decoder, visual embedder, depth head (K times)."""
    # embeddings and lm_head are left out: a visual token does not read them
    parts = (model.language_model.layers, model.visual_embedder, model.depth_head)
    sizes = [sum(m.weight.numel() for m in p.modules() if isinstance(m, nn.Linear)) for p in parts]
    return sizes[0], sizes[1], sizes[2] * model.config.num_codebooks


def measure_agreement(folder: str) -> dict[str, float]:
    """Shares of equal codes: bf16 and int8 against fp32, and a seed alone against the same seed in a batch.

    The first is teacher-forced on fp32's greedy codes with guidance, so that one difference does not affect
    later codes.
    """
    pipe = Pipeline.from_pretrained(folder)
    prompts = pipe.prompt_ids(["a red circle", "two blue squares", "a green star above a yellow circle"])
    unconditional = pipe.processor.unconditional_ids()
    rows = [*prompts, *[unconditional] * len(prompts)]
    greedy, sampled = Sampling(guidance=GUIDANCE, greedy=True), Sampling(guidance=GUIDANCE)
    codes = generate_image_codes(pipe.model, prompts, greedy, [0] * len(prompts), unconditional)
    found = {}
    for precision in ("fp32", "bf16", "int8"):
        model = pipe.model.to(torch.bfloat16) if precision == "bf16" else pipe.model
        if precision == "int8":
            # load the weights again: the conversion to bf16 was in place
            model = Pipeline.from_pretrained(folder, quantization="int8").model
        found[precision] = teacher_forced_agreement(model, rows, codes)
        if precision != "int8":
            batch = generate_image_codes(model, prompts, sampled, range(len(prompts)), unconditional)
            alone = [
                generate_image_codes(model, [ids], sampled, [seed], unconditional)
                for seed, ids in enumerate(prompts)
            ]
            found[f"{precision}, alone as in a batch"] = (torch.cat(alone) == batch).float().mean().item()
    return found


@torch.no_grad()
def teacher_forced_agreement(model: Any, rows: list[list[int]], codes: torch.Tensor) -> float:
    """Share of codes (B, N, K) that the model's guided logits rank first, given all earlier ones."""
    backend = BACKENDS[choose_backend(model)](model)
    backend.prefill(rows, codes[:, :0])
    hits = 0
    for t in range(codes.shape[1]):
        if t:
            backend.decode_step(codes[:, t - 1])
        for k in range(codes.shape[2]):
            logits = backend.code_logits(k, None if k == 0 else codes[:, t, k - 1]).float()
            hits += int((apply_guidance(logits, GUIDANCE).argmax(-1) == codes[:, t, k]).sum())
    return hits / codes.numel()


# ---- answers -----------------------------------------------------------------------------------------------


def make_questions(count: int, images: int) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Prompts of 256 visual tokens and 8 to 64 text ids, and the codes of their images."""
    generator = torch.Generator().manual_seed(0)
    # text of different lengths, so that a batch needs padding
    lengths = torch.randint(8, 65, (count,), generator=generator).tolist()
    texts = [torch.randint(10, 32000, (n,), generator=generator).tolist() for n in lengths]
    codes = torch.randint(4096, (images, 256, 8), generator=generator)
    prompts = [[1, 7, 8, 9, *[-200] * 256, 13, *text] for text in texts]
    return prompts, [codes[i % images][None] for i in range(count)]


def measure_answers() -> dict[str, Any]:
    """Seconds for 32 questions of mixed lengths: batched, one by one, and with transformers' `generate`.

    One by one is measured on every fourth question, times four. "photos": every question about its own image,
    16 new tokens. "dialogues": four questions per image, 32 new tokens. Floors: the multiplications of the
    batch at this run's GFLOP/s.
    """
    model, found = benchmark_model(), {}
    decoder, embedder, _ = weights_per_token(model)
    rate = measure_machine()["fp32_gflop_s"] * 1e9
    for name, (images, new_tokens) in ANSWER_CASES.items():
        prompts, codes = make_questions(32, images)

        def batched(prompts=prompts, codes=codes, new_tokens=new_tokens) -> None:
            generate_text_ids(model, prompts, codes, new_tokens)

        def one_by_one(prompts=prompts, codes=codes, new_tokens=new_tokens, **options) -> None:
            for i in range(0, 32, 4):
                generate_text_ids(model, [prompts[i]], [codes[i]], new_tokens, **options)

        # prefill reads an image once for all its questions; the last new token needs no decode step
        read = images * 256 * (decoder + embedder) + sum(len(p) - 256 for p in prompts) * decoder
        written = 32 * (new_tokens * model.lm_head.weight.numel() + (new_tokens - 1) * decoder)
        found[name] = {
            "batched_s": best_seconds(batched, 2),
            "one_by_one_s": 4 * best_seconds(one_by_one, 2),
            # an explicit option of `generate` selects transformers' own loop
            "transformers_one_by_one_s": 4 * best_seconds(lambda: one_by_one(use_cache=True), 2),
            "prefill_floor_s": 2 * read / rate,
            "decode_floor_s": 2 * written / rate,
        }
    return found


def measure_prefix() -> dict[str, Any]:
    """Seconds for four questions about one image, 4 new tokens each, with and without a shared prefix."""
    model = benchmark_model()
    prompts, codes = make_questions(4, 1)

    def one_by_one() -> None:
        for prompt, image_codes in zip(prompts, codes):
            generate_text_ids(model, [prompt], [image_codes], 4, share_prefix=False)

    return {
        "shared_s": best_seconds(lambda: generate_text_ids(model, prompts, codes, 4)),
        "batched_s": best_seconds(lambda: generate_text_ids(model, prompts, codes, 4, share_prefix=False)),
        "one_by_one_s": best_seconds(one_by_one),
    }


# ---- report ------------------------------------------------------------------------------------------------


def report(results: dict[str, Any]) -> str:
    """Tables of all results."""
    lines, machine = [], results.get("machine")
    if machine:
        lines.append(
            f"machine: {machine['memory_gb_s']:.0f} GB/s from memory, "
            f"{machine['cache_gb_s']:.0f} from cache, {machine['fp32_gflop_s']:.0f} fp32 GFLOP/s, "
            f"{machine['cpu']}"
        )
    lines.append("part               ms  ratio   floor  x flr last/first     MB same codes")
    lines += [image_line(part, results) for part in IMAGE_PARTS if part in results]
    lines += [
        profile_line(part, results[part]) for part in IMAGE_PARTS if results.get(part, {}).get("profile_ms")
    ]
    cases = {name: times for name, times in results.get("answers", {}).items() if name in ANSWER_CASES}
    for name, times in (cases | {k: v for k, v in results.items() if k == "prefix"}).items():
        seconds = {k.removesuffix("_s"): v for k, v in times.items() if k.endswith("_s")}
        first = next(iter(seconds.values()))
        lines.append(f"{name}: " + ", ".join(f"{k} {v:.2f} s = {v / first:.2f}x" for k, v in seconds.items()))
    return "\n".join(lines)


def image_line(part: str, results: dict[str, Any]) -> str:
    """Time, ratio to the baseline, the time to read the weights once ("floor"), memory, equality of codes."""
    images, precision, _ = IMAGE_PARTS[part]
    now, base, machine = results[part], results.get(f"baseline_{images}"), results.get("machine")
    bytes_per_weight = {"bf16": 2, "compiled_bf16": 2, "int8": 1}.get(precision, 4)
    num_bytes = sum(now["weights"].values()) * bytes_per_weight
    floor = num_bytes / machine["memory_gb_s"] / 1e6 if machine else float("nan")
    ratio = base["ms"] / now["ms"] if base else float("nan")
    count = min(len(now["codes"][0]), len(base["codes"][0])) if base else 0
    same = base and all(a[:count] == b[:count] for a, b in zip(now["codes"], base["codes"]))
    return (
        f"{part:15} {now['ms']:8.2f} {ratio:6.2f} {floor:7.2f} {now['ms'] / floor:5.2f} "
        f"{now['last_over_first']:10.2f} {now['peak_mb']:6.0f} {same}"
    )


def profile_line(part: str, now: dict[str, Any]) -> str:
    """The time per visual token by part."""
    times = now["profile_ms"]
    depth_head = len(now["codes"][0][0]) * times["code_logits"]
    rest = now["ms"] - times["decode_step"] - depth_head  # guidance, argmax, Python
    return (
        f"{part}: embedder and decoder {times['decode_step']:.1f} ms, depth head {depth_head:.1f}, "
        f"sampling and Python {rest:.1f}"
    )


# ---- GPU ---------------------------------------------------------------------------------------------------


def measure_gpu() -> dict[str, Any]:
    """Seconds per image of the 7B shape in bfloat16, against the baseline and the bandwidth floor."""
    assert torch.cuda.is_available(), "--gpu needs a CUDA device"
    # construct in bf16 on the GPU: the fp32 model would take 28 GB first
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = UniTokForConditionalGeneration(UniTokMLLMConfig.named("unitok_mllm_7b")).eval()
        torch.set_default_dtype(torch.float32)
    numbers = torch.ones(2**31, dtype=torch.uint8, device="cuda")
    seconds = best_seconds(lambda: numbers.view(torch.float32).sum(), 5, "cuda")
    found: dict[str, Any] = {"device": device_name("cuda"), "memory_gb_s": numbers.numel() / seconds / 1e9}
    floor = 2 * sum(weights_per_token(model)) * 256 / found["memory_gb_s"] / 1e9
    for images in (1, 4, 16, 64):
        prompts = [[*PROMPT, i, 3] for i in range(images)]

        def ours(prompts=prompts) -> None:
            sampling, seeds = Sampling(guidance=GUIDANCE), list(range(len(prompts)))
            generate_image_codes(model, prompts, sampling, seeds, UNCONDITIONAL)

        def baseline(prompts=prompts) -> None:
            for _, _ in zip(range(32), iter_baseline_codes(model, prompts, UNCONDITIONAL, GUIDANCE)):
                pass

        measure_seconds(ours, "cuda")  # warm up: compilation, graph capture
        elapsed = measure_seconds(ours, "cuda")
        # 32 of 256 tokens, extrapolated: the baseline is slow
        baseline_elapsed = 256 / 32 * measure_seconds(baseline, "cuda")
        found[f"batch_{images}"] = {
            "s_per_image": elapsed / images,
            "over_floor": elapsed / floor,
            "ratio_to_baseline": baseline_elapsed / elapsed,
        }
    write_results(result_file("generation", found["device"]), found)
    return found


if __name__ == "__main__":
    main()
