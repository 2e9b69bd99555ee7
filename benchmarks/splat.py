"""The splat of 2D Gaussians against the dense formula in torch: time and peak memory against their number.

    python benchmarks/splat.py [--gaussians 64 256 1024 4096 16384] [--channels 8] [--grid 32]

One image, float32, one thread. Every row runs in its own process, so that peak memory is its own: that of
forward and backward pass above that of the process before them. Writes benchmarks/results/splat-DEVICE.json.
"""

import argparse
import json
import math
from typing import Any

import torch
from harness import (
    best_seconds,
    load_average,
    peak_memory_gib,
    processor_name,
    read_results,
    reset_peak_memory,
    result_file,
    run_isolated,
    write_results,
)
from torch import Tensor

from open_unitok.tokenizer.decoders.splat import CUT, splat
from open_unitok.tokenizer.quantizers.gaussian import activate

HEAD = ("Gaussians", "splat, ms", "dense, ms", "with backward, ms", "dense, ms", "peak, MiB", "dense, MiB")


def dense(xy: Tensor, scale: Tensor, rotation: Tensor, features: Tensor, grid: tuple[int, int]) -> Tensor:
    """As `splat`, the formula written out: covariance, its inverse, a weight per Gaussian and pixel."""
    height, width = grid
    rows, columns = torch.arange(height).float(), torch.arange(width).float()
    pixels = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)  # (H, W, 2)
    centres = (xy + 1) / 2 * torch.tensor([width, height])
    offsets = pixels[None, None] - centres[:, :, None, None]  # (B, G, H, W, 2)
    cos, sin = rotation.cos(), rotation.sin()
    turn = torch.stack([cos, sin, -sin, cos], dim=-1).unflatten(-1, (2, 2))
    axes = turn * scale[..., None, :]
    inverse = torch.linalg.inv(axes @ axes.mT)
    power = torch.einsum("bghwi,bgij,bghwj->bghw", offsets, inverse, offsets)
    weights = torch.exp(-0.5 * power)
    weights = torch.where(weights < CUT, 0.0, weights)
    return torch.einsum("bghw,bgc->bchw", weights, features)


def main() -> None:
    """Measure all sizes, write the results, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gaussians", type=int, nargs="+", default=[64, 256, 1024, 4096, 16384])
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--grid", type=int, default=32, help="side of the map")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "G"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]), args.channels, args.grid)))
        return
    path = result_file("splat", processor_name())
    results, sizes = read_results(path), ["--channels", str(args.channels), "--grid", str(args.grid)]
    print("\n".join("| " + " | ".join(cells) + " |" for cells in (HEAD, ("---",) * len(HEAD))))
    for count in args.gaussians:
        pair = [run_isolated(__file__, *sizes, "--one", kind, str(count)) for kind in ("splat", "dense")]
        results[f"{count} on {args.grid} x {args.grid} x {args.channels}"] = dict(
            zip(("splat", "dense"), pair)
        )
        write_results(path, results)
        cells = [f"{x[key]:.1f}" for key in ("forward_ms", "step_ms", "peak_mib") for x in pair]
        print("| " + " | ".join([f"{count:,}", *cells]) + " |", flush=True)


def measure(kind: str, count: int, channels: int, side: int) -> dict[str, Any]:
    """Milliseconds of the forward pass and of both passes, and the peak memory of both in MiB."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    values = activate(torch.randn(1, count, 5, generator=generator))
    inputs = [values[..., :2], values[..., 3:], values[..., 2], torch.randn(1, count, channels)]
    inputs = [x.clone().requires_grad_() for x in inputs]
    render = splat if kind == "splat" else dense
    grid = (side, side)

    def step() -> None:
        render(*inputs, grid).square().sum().backward()

    # before anything else has used memory; a small step loads torch's kernels
    small = [x[:, :2].detach().clone().requires_grad_() for x in inputs]
    render(*small, (4, 4)).sum().backward()
    reset_peak_memory()
    before = peak_memory_gib()
    step()
    after = peak_memory_gib()
    repeats = max(3, min(30, math.ceil(2**13 / count)))
    with torch.no_grad():
        forward = best_seconds(lambda: render(*inputs, grid), repeats)
    return {
        "forward_ms": round(1000 * forward, 3),
        "step_ms": round(1000 * best_seconds(step, repeats), 3),
        "peak_mib": round(1024 * ((after or 0) - (before or 0)), 2),
        "load": load_average(),
    }


if __name__ == "__main__":
    main()
