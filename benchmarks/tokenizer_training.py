"""Time and memory of a training step of the tokenizer on a CPU: each way against the plainest one of the run.

A step has all losses: reconstruction, LPIPS, quantiser, and a DINO discriminator with the adaptive GAN
weight, with random weights. "plain": both networks are in the graph, so that they run backward twice.
"once": they run backward once. "convolutions", "all": with engine.gradient_checkpointing and `recompute`,
the networks in pieces. Seconds are those of the processor, so that other load counts less; memory is the most
that torch's allocator hands out at a time. They say nothing about a GPU but for the amount of work.

"memory returned", "memory kept": a step of configs/study/base.yaml (24 images of 64 pixels, without these
networks) where freed memory goes back to the kernel, as by default, and where the process keeps it, as in
`unitok train` on a CPU; a process each, in turns.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import (
    RESULTS,
    load_average,
    peak_memory_gib,
    processor_name,
    result_file,
    run_isolated,
    write_results,
)
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from open_unitok.core.memory import keep_freed_memory
from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.tokenizer.frozen.dinov2 import DINOv2
from open_unitok.tokenizer.frozen.lpips import LPIPS
from open_unitok.training.core.config import read_yaml
from open_unitok.training.tokenizer.diff_augment import View
from open_unitok.training.tokenizer.discriminator import DinoDiscriminator
from open_unitok.training.tokenizer.gan import adaptive_weight, sample_views
from open_unitok.training.tokenizer.image_losses import PIECE, loss_of_images
from open_unitok.training.tokenizer.losses import generator_loss, reconstruction_losses
from open_unitok.training.tokenizer.model import recompute_activations

WAYS = ("plain", "once", "convolutions", "all")
ALLOCATORS = ("memory returned", "memory kept")
SMALL_STEPS, SMALL_BATCH = 15, 24


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=64, help="of the stem; the blocks have 8 times as many")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--side", type=int, default=128, help="image side in pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--allocator", choices=ALLOCATORS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.allocator:
        print(json.dumps(measure_small_step(args.allocator)))
        return
    width = args.width
    config = UniTokConfig(
        image_size=args.side,
        stem_width=width,
        stage_widths=(width, 2 * width),
        decoder_widths=(2 * width, width),
        hidden_size=8 * width,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        embed_dim=0,
    )
    steps = {way: build_step(config, args.batch, way) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for repeat in range(args.repeats + 1):
        for way, step in steps.items():
            start = time.process_time()
            step()
            if repeat:  # the first one allocates gradients
                seconds[way].append(time.process_time() - start)
    memory = {way: allocated_bytes(step) for way, step in steps.items()}
    results: dict[str, Any] = {
        "device": processor_name(),
        "torch": torch.__version__,
        "case": {key: value for key, value in vars(args).items() if key not in ("out", "allocator")},
    }
    for way in WAYS:
        found = statistics.median(seconds[way])
        results[way] = {
            "seconds": round(found, 3),
            "time_ratio": round(found / statistics.median(seconds["plain"]), 3),
            "mib_per_image": round(memory[way] / args.batch / 2**20, 1),
            "memory_ratio": round(memory[way] / memory["plain"], 3),
        }
        print(way, results[way], flush=True)
    results |= compare_allocators(args.repeats)
    results["load"] = load_average()
    path = result_file("tokenizer-training", processor_name(), args.out)
    write_results(path, results)
    print(path)


def build_step(config: UniTokConfig, batch: int, way: str) -> Callable[[], None]:
    """A forward and backward pass of the generator."""
    torch.manual_seed(0)
    model, lpips, discriminator = UniTok(config).train(), LPIPS(), DinoDiscriminator(DINOv2())
    if way in ("convolutions", "all"):
        recompute_activations(model, way)
    pixels = torch.rand(batch, 3, *config.image_shape) * 2 - 1
    views = sample_views(discriminator, 0, 0, range(batch), config.image_shape)
    piece = PIECE if way in ("convolutions", "all") else None

    def perceptual(images: Tensor, part: slice) -> Tensor:
        return lpips(images, pixels[part]).mean()

    def generator(images: Tensor, part: slice) -> Tensor:
        noise, crop = views["generator"]
        return generator_loss(
            discriminator, images, View(noise._replace(amounts=noise.amounts[:, part]), crop)
        )

    def step() -> None:
        out = model(pixels)
        images = out.reconstruction
        if way == "plain":
            found = [perceptual(images, slice(None)), generator(images, slice(None))]
        else:
            found = [loss_of_images(images, loss, piece) for loss in (perceptual, generator)]
        plain = reconstruction_losses(images, pixels)
        total = 0.2 * plain["l1"] + plain["l2"] + found[0]
        weight = adaptive_weight(total, found[1], model.decoder.last_weight)
        (total + out.losses["vq"] + 0.4 * weight * found[1]).backward()

    return step


def compare_allocators(repeats: int) -> dict[str, Any]:
    """Medians over processes that take turns."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ALLOCATORS}
    for _ in range(repeats):
        for name in ALLOCATORS:
            found[name].append(run_isolated(__file__, "--allocator", name))
    results = {}
    for name, rows in found.items():
        seconds, memory = (statistics.median(row[key] for row in rows) for key in ("seconds", "gib"))
        results[name] = {"seconds": round(seconds, 3), "gib": round(memory, 3)}
        plain = found[ALLOCATORS[0]]
        results[name]["time_ratio"] = round(seconds / statistics.median(row["seconds"] for row in plain), 3)
        results[name]["memory_ratio"] = round(memory / statistics.median(row["gib"] for row in plain), 3)
        print(name, results[name], flush=True)
    return results


def measure_small_step(allocator: str) -> dict[str, float]:
    """Seconds of the processor for a step, the median, and the peak memory of this process in GiB."""
    if allocator == "memory kept" and not keep_freed_memory():
        raise SystemExit("this C library has no mallopt")
    torch.manual_seed(0)
    config = read_yaml(Path(__file__).parents[1] / "configs/study/base.yaml")["model"]
    model = UniTok(UniTokConfig(**config)).train()
    pixels = torch.rand(SMALL_BATCH, 3, *model.config.image_shape) * 2 - 1
    seconds = []
    for _ in range(SMALL_STEPS):
        start = time.process_time()
        out = model(pixels)
        losses = reconstruction_losses(out.reconstruction, pixels)
        (losses["l1"] + losses["l2"] + out.losses["vq"]).backward()
        seconds.append(time.process_time() - start)
    return {"seconds": statistics.median(seconds), "gib": peak_memory_gib() or 0.0}


def allocated_bytes(step: Callable[[], None]) -> int:
    """The most that a step allocates at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # pyright: ignore
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


if __name__ == "__main__":
    main()
