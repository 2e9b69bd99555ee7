"""Speed of image and text generation, beside what a user would run instead, each in pairs with a baseline.

    python benchmarks/generation.py [--isa native avx2] [--seconds 720] [--parts NAME ...] [--out DIR]
    python benchmarks/generation.py --table                # README's table from the results in DIR
    python benchmarks/generation.py --agreement MODEL      # bf16 and int8 against fp32, teacher-forced

Baseline of images: generation_parts/baseline.py, the published sampling loop in eager PyTorch and float32,
with transformers' growing KV cache and the depth head recomputed on its prefix for every code. Every part
runs in its own process, in which steps of the part and of the baseline alternate: a slow change of the
machine's speed cancels. Another busy process does not (torch's threads spin, the C++ steps' yield): measure
on a quiet machine; the table shows no ratio whose quartiles differ by more than a third.

Peers: generation_parts/peers.py (torch.compile, torchao, LlamaGen's loop, transformers' `generate`). Model:
hidden 512, intermediate 1376, 8 layers, 8 heads, vocabulary 32000, 8 x 4096 codes, depth head of 3 layers,
256 visual tokens, guidance 5, random weights, 2 threads. One step of it takes torch.compile minutes, so its
parts have 2 layers and 2 codes, and the C++ steps run beside them in the same turns: the result is their
share of the C++ steps' speed.

`--isa avx2` holds torch, oneDNN, MKL, inductor and the C++ backend to AVX2 on a processor that has more; such
results are named "emulated". torch.compile keeps what it compiled in TORCHINDUCTOR_CACHE_DIR, and a second
run is shorter: `first_s`, the seconds until the second token, is of an empty cache only with `--cold`.

Questions about one image each gain little over one by one, and no code can change that. At this run's GFLOP/s
reading 32 images of 256 tokens takes 2 * 32 * 256 * 33.7 M = 0.55 TFLOP, 3.5 of 5.7 s; one by one it is the
same work with 256 rows instead of 512 in a product. Only the rest, 16 decode steps for 32 answers, is divided
by the batch. Questions that share an image read it once.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from generation_parts.answers import measure_answers, measure_prefix
from generation_parts.baseline import iter_baseline_codes
from generation_parts.model import (
    GUIDANCE,
    UNCONDITIONAL,
    benchmark_model,
    cache_bytes,
    image_prompts,
    weights_per_token,
)
from generation_parts.peers import (
    Compiled,
    iter_static_codes,
    quantize_by_torchao,
    torchao_obstacle,
    tune_inductor,
)
from generation_parts.table import readme_table, report
from harness import (
    RESULTS,
    best_seconds,
    load_average,
    processor_name,
    read_results,
    result_file,
    write_results,
)
from torch import nn

from open_unitok import Pipeline
from open_unitok.generation import Sampling, generate_image_codes, iter_image_codes
from open_unitok.generation.backends import BACKENDS, choose_backend
from open_unitok.generation.backends.int8 import quantize_model
from open_unitok.generation.backends.native import Native
from open_unitok.generation.sampling import apply_guidance


class Case(NamedTuple):
    """One part: how many images, in which weights, by which loop, and how many visual tokens of 256."""

    images: int
    weights: str  # fp32, bf16, int8
    path: str  # baseline, llamagen, eager, native, compiled, tuned
    tokens: int


ISAS: dict[str, dict[str, str]] = {
    "native": {},
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "TORCHINDUCTOR_CPP_MARCH": "x86-64-v3",
        "UNITOK_NATIVE_MARCH": "x86-64-v3",
    },
}
CASES = {
    "baseline_1": Case(1, "fp32", "baseline", 24),  # against itself: the noise
    "fp32_1": Case(1, "fp32", "native", 256),
    "bf16_1": Case(1, "bf16", "native", 256),
    "int8_1": Case(1, "int8", "native", 256),
    "eager_1": Case(1, "fp32", "eager", 24),
    "llamagen_1": Case(1, "fp32", "llamagen", 24),
    "fp32_8": Case(8, "fp32", "native", 256),
    "bf16_8": Case(8, "bf16", "native", 128),
    "int8_8": Case(8, "int8", "native", 128),
    "tuned_1": Case(1, "fp32", "tuned", 128),
    "tuned_bf16_1": Case(1, "bf16", "tuned", 128),
    "torchao_1": Case(1, "int8", "tuned", 128),
    "tuned_8": Case(8, "fp32", "tuned", 64),
    "compiled_1": Case(1, "fp32", "compiled", 48),
    "tuned_bf16_8": Case(8, "bf16", "tuned", 64),
    "baseline_8": Case(8, "fp32", "baseline", 24),
}
# In the order of their worth, for a run that is short of time; what compiles comes last.
PARTS = ("machine", *list(CASES)[:9], "answers", "prefix", *list(CASES)[9:])
BASELINE_STEPS = {1: 32, 8: 20}  # images -> steps of the baseline beside a part
COMPILED = ("compiled", "tuned")
LIMIT = 240  # seconds of one part


def main() -> None:
    """Run each part in its own process, write after each, and print the ratios."""
    args = make_parser().parse_args()
    if args.part:
        torch.set_num_threads(args.threads)
        print(json.dumps(measure_part(args.part, args.toy)))
    elif args.agreement:
        torch.set_num_threads(args.threads)
        print(json.dumps(measure_agreement(args.agreement)))
    elif args.table:
        print(readme_table(args.out))
    else:
        run_parts(args)
        print(readme_table(args.out))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, metavar="PART")
    parser.add_argument("--isa", nargs="+", default=["native"], choices=ISAS, help="instructions to use")
    parser.add_argument("--seconds", type=float, default=3600, help="parts that do not fit are left out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cold", action="store_true", help="compile without what earlier runs compiled")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--table", action="store_true", help="print README's table of the results")
    parser.add_argument("--agreement", metavar="MODEL", help="compare the precisions on a trained model")
    parser.add_argument("--toy", action="store_true", help="a tiny model, to test the script")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # for the process of one part
    return parser


def run_parts(args: argparse.Namespace) -> None:
    """Every part with every set of instructions, in turns, until the time is over."""
    end = time.monotonic() + args.seconds
    files = {isa: result_file("generation", name_processor(isa), args.out) for isa in args.isa}
    # a run of all parts starts anew; one of some keeps the others
    results = {isa: {} if args.parts == PARTS else read_results(file) for isa, file in files.items()}
    for part in args.parts:
        for isa, found in results.items():
            limit = min(LIMIT, end - time.monotonic())
            print(f"{isa} {part} (load {load_average()}) ...", file=sys.stderr, flush=True)
            entry = run_part(part, isa, limit, args) if limit > 5 else {"skipped": "no time left"}
            if "skipped" not in entry or part not in found:
                found[part] = entry | {"load": load_average()}
            write_results(files[isa], found)
            print(report({part: entry}, found.get("machine")), flush=True)
    for isa, found in results.items():
        print(f"\n{isa}: {files[isa]}\n{report(found, found.get('machine'))}", flush=True)


def run_part(part: str, isa: str, limit: float, args: argparse.Namespace) -> dict[str, Any]:
    """The results of a part in a process of its own, or why there are none."""
    environment = os.environ | ISAS[isa]
    command = [sys.executable, __file__, "--part", part, "--threads", str(args.threads)]
    with tempfile.TemporaryDirectory() as empty:
        if args.cold:
            environment["TORCHINDUCTOR_CACHE_DIR"] = empty
        try:
            done = subprocess.run(
                [*command, *["--toy"] * args.toy],
                env=environment, capture_output=True, text=True, timeout=limit,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"skipped": f"not finished after {limit:.0f} s"}
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["no output"]
    return json.loads(lines[-1]) if done.returncode == 0 else {"skipped": lines[-1][:300]}


def name_processor(isa: str) -> str:
    """As `processor_name`, with the instructions that a part of this kind uses."""
    script = "from harness import processor_name; print(processor_name())"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parent, env=os.environ | ISAS[isa],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    name = done.stdout.strip()
    return name if isa == "native" or name == processor_name() else f"{name} emulated"


def measure_part(part: str, toy: bool = False) -> dict[str, Any]:
    """The results of one part."""
    if part in CASES:
        return measure_images(CASES[part], toy)
    if part == "machine":
        return measure_machine()
    return {"answers": measure_answers, "prefix": measure_prefix}[part](toy)


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
        "torch": torch.__version__,
    }


# ---- images ------------------------------------------------------------------------------------------------


def measure_images(case: Case, toy: bool = False) -> dict[str, Any]:
    """Milliseconds per visual token of greedy decoding with guidance in turns with the baseline, the share of
    equal codes, and the peak memory in MB of the part alone."""
    if case.path == "tuned" and case.weights == "int8" and (obstacle := torchao_obstacle()):
        return {"skipped": obstacle}
    prompts, tokens = image_prompts(case.images), min(case.tokens, 8 if toy else 256)
    short = case.path in COMPILED
    base_model = benchmark_model(toy, short)
    weights, cache = weights_per_token(base_model), cache_bytes(base_model, case.images, tokens)
    model = prepare_model(base_model, case)
    backend_times, start = time_native_backend(), time.perf_counter()
    steps = {"base": iter(()), "part": iter_codes(case, model, prompts)}
    for _ in range(2):  # the prefill; then the first step, in which torch.compile compiles
        next(steps["part"])
    first_s, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    steps["base"] = iter_baseline_codes(benchmark_model(toy, short), prompts, UNCONDITIONAL, GUIDANCE)
    if short:
        native = case._replace(path="native")
        steps["native"] = iter_codes(native, prepare_model(benchmark_model(toy, short), native), prompts)
    for _ in range(2):
        for other in steps.keys() - {"part"}:
            next(steps[other])
    rounds = min(BASELINE_STEPS[case.images], tokens - 2) // 2
    counts = {name: 2 * rounds if name == "base" else tokens - 2 for name in steps}
    found, codes = time_in_turns(steps, counts, rounds)
    times, count = found["part"], min(c.shape[1] for c in codes.values())
    growth = [grow(found[name]) for name in ("part", "base")]
    ratios = {name: sorted(ratios_of_rounds(found[name], times, rounds)) for name in found if name != "part"}
    quartile = rounds // 4
    return {
        "ms": statistics.median(times),
        "best_ms": min(times),
        "base_ms": statistics.median(found["base"]),
        "ratio": statistics.median(ratios["base"]),
        "ratio_quartiles": [ratios["base"][quartile], ratios["base"][-1 - quartile]],
        **({"of_native": statistics.median(ratios["native"])} if short else {}),
        # over the baseline's, which reads few positions: another load at the end cancels
        "last_over_first": growth[0] / growth[1],
        "same_codes": (codes["base"][:, :count] == codes["part"][:, :count]).float().mean().item(),
        "first_s": first_s,
        "peak_mb": peak / 1024,
        "dtype": case.weights,
        "images": case.images,
        "books": codes["part"].shape[2],
        "weights": dict(zip(("decoder", "embedder", "depth"), weights)),
        "cache_bytes": cache,
        "profile_ms": {name: statistics.median(ms) for name, ms in backend_times.items() if ms},
    }


def prepare_model(model: Any, case: Case) -> Any:
    """A float32 model in the weights of the case, in place."""
    if case.weights == "fp32":
        return model
    if case.weights == "bf16":
        return model.to(torch.bfloat16)
    if case.path == "tuned":
        quantize_by_torchao(model)
    else:
        quantize_model(model)
    return model


def iter_codes(case: Case, model: Any, prompts: list[list[int]]) -> Iterator[torch.Tensor]:
    """The codes so far, after every visual token, by the loop of the case."""
    if case.path == "baseline":
        return iter_baseline_codes(model, prompts, UNCONDITIONAL, GUIDANCE)
    if case.path == "llamagen":
        return iter_static_codes(model, prompts, UNCONDITIONAL)
    if case.path in COMPILED:
        BACKENDS["torch"] = Compiled
    if case.path == "tuned":
        tune_inductor(case.images, case.weights)
    sampling = Sampling(guidance=GUIDANCE, greedy=True)
    backend = "native" if case.path == "native" else "torch"
    return iter_image_codes(model, prompts, sampling, [0] * len(prompts), UNCONDITIONAL, backend=backend)


def time_in_turns(
    steps: dict[str, Iterator[torch.Tensor]], counts: dict[str, int], rounds: int
) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    """Milliseconds of `counts` steps of each iterator, a part of them in every round; the last results."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    last = {}
    for r in range(rounds):
        for name, iterator in steps.items():
            for _ in range(counts[name] * r // rounds, counts[name] * (r + 1) // rounds):
                start = time.perf_counter()
                last[name] = next(iterator)
                times[name].append(1000 * (time.perf_counter() - start))
    return times, last


def grow(times: list[float]) -> float:
    """How many times the first quarter the last one takes."""
    quarter = max(1, len(times) // 4)
    return statistics.median(times[-quarter:]) / statistics.median(times[:quarter])


def ratios_of_rounds(others: list[float], times: list[float], rounds: int) -> list[float]:
    """Median time of the other over that of the part, of each round."""

    def medians(found: list[float]) -> list[float]:
        edges = [len(found) * r // rounds for r in range(rounds + 1)]
        return [statistics.median(found[a:b]) for a, b in itertools.pairwise(edges)]

    return [a / b for a, b in zip(medians(others), medians(times))]


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


if __name__ == "__main__":
    main()
