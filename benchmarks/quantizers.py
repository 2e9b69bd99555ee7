"""Search and losses of each quantiser against UniTok's in one run, with the peak memory of each.

    python benchmarks/quantizers.py                      # all kinds at three sizes, one thread
    python benchmarks/quantizers.py --only pyramid --kinds attention

Sizes: 8 x 4096 x 8 and 1 x 16,384 x 256 with 4 images of 256 tokens, and a pyramid of 2,240 tokens (CODA's
for FLUX: 1 x 65,536 x 16, ten scales to 32 x 32) with one image, where the kind is the inner quantiser.
"encode" is the search alone, "step" a training forward with all losses of the kind and its backward pass.
Calls of the kind and of `multi_codebook`, with the same losses, alternate in one process and are measured in
seconds of the processor, which other load changes little; the ratio of the fastest calls is the result.

Memory: peak resident memory of an own process beyond what it held before the step (VmHWM), freed blocks given
back to the system. "one-hot": what one float32 matrix of (tokens x entries) would take. Floor: the matrix
products of the step, counted by torch, at the rate of a large float32 product of the same process, and the
bytes that must be held at once: latents, outputs, tables and their gradients.
"""

import argparse
import json
import os
import time
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
HEAD = ("size", "kind", "encode / UniTok's", "step / UniTok's", "step / floor", "peak, MiB", "one-hot, MiB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=list(SIZES), choices=SIZES, help="sizes")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--part", nargs="+", default=["time", "memory"], choices=["time", "memory"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # "size|kind|part", in a process of its own
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        size, kind, part = args.child.split("|")
        memory = part == "memory"
        print(json.dumps(measure_memory(size, kind) if memory else measure_time(size, kind, args.repeats)))
        return
    file = result_file("quantizers", processor_name(), args.out)
    results = read_results(file)
    for size in args.only:
        for kind in args.kinds:
            entry = results.setdefault(f"{size}, {kind}", {})
            for part in args.part:
                # glibc keeps freed blocks below 32 MiB, which is not memory that the step needs
                os.environ.pop("MALLOC_MMAP_THRESHOLD_", None)
                if part == "memory":
                    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
                entry |= run_isolated(
                    __file__, "--child", f"{size}|{kind}|{part}", "--repeats", str(args.repeats)
                )
            write_results(file, results)
    print(f"load average {load_average()}")
    rows = [table_row(name, entry) for name, entry in results.items()]
    print("\n".join("| " + " | ".join(cells) + " |" for cells in (HEAD, ("---",) * len(HEAD), *rows)))


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


def measure_time(size: str, kind: str, repeats: int) -> dict[str, float]:
    """Seconds of one kind at one size, in turns with UniTok's, and of 1 GFLOP of a large product."""
    latents, entropy = some_latents(size), kind not in NO_ENTROPY
    quantizer, base = build(size, kind), build(size, UNITOK)
    quantizer.encode(latents)  # kernels are loaded
    times: dict[str, list[float]] = {name: [] for name in ("encode", "step", "base encode", "base step")}
    for _ in range(repeats):
        for prefix, other in (("", quantizer), ("base ", base)):
            times[f"{prefix}encode"].append(processor_seconds(lambda other=other: other.encode(latents)))
            times[f"{prefix}step"].append(
                processor_seconds(lambda other=other: step(other, latents, entropy))
            )
    seconds = {name: min(values) for name, values in times.items()}
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    product = min(processor_seconds(lambda: a @ b) for _ in range(5))
    return {
        "encode_seconds": round(seconds["encode"], 4),
        "step_seconds": round(seconds["step"], 4),
        "encode_ratio": round(seconds["encode"] / seconds["base encode"], 2),
        "step_ratio": round(seconds["step"] / seconds["base step"], 2),
        "gflop_seconds": round(product / (2 * 1.024**3), 5),
    }


def table_row(name: str, entry: dict[str, float]) -> tuple[str, ...]:
    """The cells of one row, in the order of HEAD."""
    size, kind = name.split(", ")
    floor = entry["step_seconds"] / (entry["step_gflop"] * entry["gflop_seconds"])
    return (
        size,
        kind,
        f"{entry['encode_ratio']:.2f}",
        f"{entry['step_ratio']:.2f}",
        f"{floor:.1f}",
        f"{entry['peak_mib']:.0f} (floor {entry['floor_mib']:.0f})",
        f"{entry['one_hot_mib']:.0f}",
    )


if __name__ == "__main__":
    main()
