"""Search and losses of each quantiser against UniTok's in one run, with the peak memory of each.

    python benchmarks/quantizers.py [--repeats 2]       # all kinds at three sizes, one thread
    python benchmarks/quantizers.py --only pyramid --kinds attention    # keeps the file's other entries
    python benchmarks/quantizers.py --table             # the table of docs/systems.md from the results

Sizes: 8 x 4096 x 8 and 1 x 16,384 x 256 with 4 images of 256 tokens, and a pyramid of 2,240 tokens (CODA's
for FLUX: 1 x 65,536 x 16, ten scales to 32 x 32) with one image, where the kind is the inner quantiser.
"encode" is the search alone, "step" a training forward with all losses of the kind and its backward pass.
Calls of all kinds of a size, and of UniTok's with the same losses, alternate in one process and are measured
in seconds of the processor, which other load changes little; the ratio of the fastest calls is the result.

Memory: peak resident memory of an own process beyond what it held before the step (VmHWM), freed blocks given
back to the system. "one-hot": what one float32 matrix of (tokens x entries) would take. Floor: the matrix
products of the step, counted by torch, at the rate of a large float32 product of the same process, and the
bytes that must be held at once: latents, outputs, tables and their gradients.
"""

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import (
    RESULTS,
    load_average,
    peak_memory_gib,
    processor_name,
    read_results,
    reset_peak_memory,
    result_file,
    run_isolated,
    write_results,
)
from torch.utils.flop_counter import FlopCounterMode

from open_unitok.tokenizer import QUANTIZERS, Quantizer
from open_unitok.tokenizer.quantizers.base import SIMILARITY_BLOCK

UNITOK = "multi_codebook"
SCALES = [1, 2, 3, 4, 6, 9, 13, 18, 24, 32]  # 2,240 tokens
# size -> books, entries, width, images, tokens of the encoder's grid
SIZES = {
    "8 x 4096 x 8": (8, 4096, 8, 4, 256),
    "1 x 16384 x 256": (1, 16384, 256, 4, 256),
    "pyramid": (1, 65536, 16, 1, 1024),
}
NO_ENTROPY = ("nearest", "ema", "cluster")
KINDS = {
    **{name: {} for name in (UNITOK, "nearest", "ibq", "ema", "cluster", "shared_index")},
    "attention": {"attention_dim": 32},
}
PYRAMID_KINDS = (UNITOK, "ibq", "shared_index", "attention")
TOY_SIZES = {name: (*(min(n, 16) for n in numbers[:3]), 1, 1024) for name, numbers in SIZES.items()}
HEAD = (
    *("size", "kind", "encode / UniTok's", "step / UniTok's", "step, s", "GFLOP of products"),
    *("their share of the step", "peak (floor), MiB", "one matrix, MiB"),
)


def main() -> None:
    args = make_parser().parse_args()
    torch.set_num_threads(1)
    if args.toy:
        SIZES.update(TOY_SIZES)
    if args.child:
        size, kinds, part = args.child.split("|")
        measured = measure_memory(size, kinds) if part == "memory" else {}
        print(json.dumps(measured or measure_times(size, kinds.split(","), args.repeats)))
        return
    file = result_file("quantizers", processor_name(), args.out)
    # a whole run starts anew: its rows belong together
    whole = args.only == list(SIZES) and args.kinds == list(KINDS)
    results = {} if whole and not args.table else read_results(file)
    if not args.table:
        for size in args.only:
            allowed = PYRAMID_KINDS if size == "pyramid" else KINDS
            measure_size(size, [kind for kind in args.kinds if kind in allowed], args, results, file)
    print(markdown(results))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=list(SIZES), choices=SIZES, help="sizes")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument(
        "--table", action="store_true", help="print the table of the results, measure nothing"
    )
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to test the script")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # "size|kinds|part", in a process of its own
    return parser


def measure_size(
    size: str, kinds: list[str], args: argparse.Namespace, results: dict[str, Any], file: Path
) -> None:
    """Times of the kinds in one process, the memory of each in its own; written after each process."""

    def run(kinds: str, part: str) -> dict[str, Any]:
        print(f"{size}, {kinds}: {part} (load {load_average()}) ...", file=sys.stderr, flush=True)
        options = ["--repeats", str(args.repeats), *["--toy"] * args.toy]
        # glibc keeps freed blocks below 32 MiB, which is not memory that the step needs
        os.environ.pop("MALLOC_MMAP_THRESHOLD_", None)
        if part == "memory":
            os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
        return run_isolated(__file__, "--child", f"{size}|{kinds}|{part}", *options)

    common = {"load": load_average(), "block_mib": SIMILARITY_BLOCK * 4 / 2**20}
    for kind, times in run(",".join(kinds), "time").items():
        results[f"{size}, {kind}"] = times | common
    write_results(file, results)
    for kind in kinds:
        results[f"{size}, {kind}"] |= run(kind, "memory")
        write_results(file, results)


def markdown(results: dict[str, Any]) -> str:
    """The table of docs/systems.md, and the conditions of its rows."""
    rows = [table_row(name, entry) for name, entry in results.items() if "peak_mib" in entry]
    loads = [entry["load"] for entry in results.values()]
    blocks = sorted({entry["block_mib"] for entry in results.values()})
    lines = ["| " + " | ".join(cells) + " |" for cells in (HEAD, ("---",) * len(HEAD), *rows)]
    conditions = f"Similarities in blocks of {', '.join(f'{b:.0f}' for b in blocks)} MiB; load average "
    return "\n".join([*lines, "", conditions + (f"{min(loads)} to {max(loads)}" if loads else "unknown")])


def build(size: str, kind: str) -> Quantizer:
    """The quantiser of a size in training mode; a pyramid over it for "pyramid"."""
    books, entries, width, _, _ = SIZES[size]
    torch.manual_seed(0)
    options: dict[str, Any] = KINDS[kind]
    if size == "pyramid":
        kind, options = "residual", {"inner": kind, "inner_options": options, "scales": SCALES}
    make: Any = QUANTIZERS[kind]
    return make(books, entries, width, **options).train()


def some_latents(size: str) -> torch.Tensor:
    books, _, width, images, tokens = SIZES[size]
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, tokens, books * width, generator=generator)


def step(quantizer: Quantizer, latents: torch.Tensor, entropy: bool) -> None:
    """A training forward with all losses, and its backward pass."""
    own = latents.clone().requires_grad_()
    out = quantizer(own, entropy=entropy)
    loss = F.mse_loss(out.quantised, latents) + sum(out.losses.values())
    for parameter in quantizer.parameters():
        parameter.grad = None
    loss.backward()


def processor_seconds(work: Callable[[], Any]) -> float:
    """Seconds that this process spent on the processor for one call; one thread."""
    start = time.process_time()
    work()
    return time.process_time() - start


def measure_memory(size: str, kind: str) -> dict[str, float]:
    """Peak memory and matrix products of one step, before anything else has used memory."""
    latents, quantizer = some_latents(size), build(size, kind)
    quantizer.encode(latents)  # kernels are loaded
    reset_peak_memory()
    before = peak_memory_gib() or 0.0
    with FlopCounterMode(display=False) as counter:
        step(quantizer, latents, kind not in NO_ENTROPY)
    peak = (peak_memory_gib() or 0.0) - before
    books, entries, width, images, tokens = SIZES[size]
    rows = images * (sum(s * s for s in SCALES) if size == "pyramid" else tokens)
    held = 2 * (2 * latents.numel() + books * entries * width)  # latents, outputs, tables; and gradients
    return {
        "step_gflop": round(counter.get_total_flops() / 1e9, 2),
        "floor_mib": round(4 * held / 2**20, 1),
        "peak_mib": round(peak * 2**10, 1),
        "one_hot_mib": round(4 * rows * books * entries / 2**20, 1),
    }


def measure_times(size: str, kinds: list[str], repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of every kind at one size, in turns with UniTok's, and of 1 GFLOP of a large product."""
    latents = some_latents(size)
    quantizers = {kind: build(size, kind) for kind in kinds}
    base = build(size, UNITOK)
    base.encode(latents)  # kernels are loaded
    times: dict[str, list[float]] = defaultdict(list)

    def time_once(name: str, quantizer: Quantizer, entropy: bool) -> None:
        times[f"encode {name}"].append(processor_seconds(lambda: quantizer.encode(latents)))
        times[f"step {name}, {entropy}"].append(processor_seconds(lambda: step(quantizer, latents, entropy)))

    for _ in range(repeats):
        for entropy in sorted({kind not in NO_ENTROPY for kind in kinds}):  # UniTok's with the same losses
            time_once("base", base, entropy)
        for kind, quantizer in quantizers.items():
            time_once(kind, quantizer, kind not in NO_ENTROPY)
    seconds = {name: min(values) for name, values in times.items()}
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    product = min(processor_seconds(lambda: a @ b) for _ in range(5))
    found = {}
    for kind in kinds:
        encode, once = seconds[f"encode {kind}"], seconds[f"step {kind}, {kind not in NO_ENTROPY}"]
        found[kind] = {
            "encode_seconds": round(encode, 4),
            "step_seconds": round(once, 4),
            "encode_ratio": round(encode / seconds["encode base"], 2),
            "step_ratio": round(once / seconds[f"step base, {kind not in NO_ENTROPY}"], 2),
            "gflop_seconds": round(product / (2 * 1.024**3), 5),
        }
    return found


def table_row(name: str, entry: dict[str, float]) -> tuple[str, ...]:
    """The cells of one row, in the order of HEAD."""
    size, kind = name.split(", ")
    share = entry["step_gflop"] * entry["gflop_seconds"] / max(entry["step_seconds"], 1e-9)
    return (
        "pyramid, 2,240 tokens, 1 x 65536 x 16" if size == "pyramid" else size,
        f"`{kind}`",
        f"{entry['encode_ratio']:.2f}",
        f"{entry['step_ratio']:.2f}",
        f"{entry['step_seconds']:.2f}",
        f"{entry['step_gflop']:.2f}",
        f"{100 * share:.0f} %",
        f"{entry['peak_mib']:.0f} ({entry['floor_mib']:.0f})",
        f"{entry['one_hot_mib']:.0f}",
    )


if __name__ == "__main__":
    main()
