"""Speed of the visual tokenizer, relative to a baseline in the same run.

    python benchmarks/tokenizer.py                             # CPU, vitamin_large, 256 px, 2 threads
    python benchmarks/tokenizer.py --device cuda --batch 64    # torch.compile, bf16, a training step too

Baseline on CPU: tokenizer_baseline.py, the published order of operations in eager PyTorch (`F.linear`,
contiguous maps, convolutions on upsampled maps) in float32; calls of both alternate, so that other load slows
both. Floor: the operations that the shapes need, at the rate of the fastest large matrix product in the same
format and run. Weights are random, which does not change the amount of work.
"""

import argparse
import contextlib
import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import (
    RESULTS,
    best_seconds,
    device_name,
    load_average,
    measure_seconds,
    peak_memory_gib,
    read_results,
    reset_peak_memory,
    result_file,
)
from tokenizer_baseline import baseline_decode, baseline_encode, baseline_latents
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from open_unitok.tokenizer import UniTok, UniTokConfig, cpu
from open_unitok.tokenizer.frozen.lpips import LPIPS
from open_unitok.training.core.flops import peak_tflops

MARGIN = 1e-4  # rounding may change a code whose two nearest entries differ by less than this


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="vitamin_large")
    parser.add_argument("--side", type=int, default=256, help="image side in pixels")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parts, formats = ["encode", "decode"], ["float32", "bfloat16"]
    parser.add_argument("--part", nargs="+", default=parts, choices=parts)
    parser.add_argument("--dtype", nargs="+", default=formats, choices=formats)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--product", type=int, default=2048, help="matrix side of the product for the floor")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=NUMBER", help="override the config")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    changes: dict[str, Any] = {
        key: json.loads(value) for key, _, value in (x.partition("=") for x in args.set)
    }
    if args.device == "cpu":  # the text tower is not measured: keep it small
        changes |= {"text_num_layers": 1, "text_vocab_size": 64}
    config = UniTokConfig.named(args.size, **changes)
    rows = run_cpu(args, config) if args.device == "cpu" else run_cuda(args, config)
    print(save(args, device_name(args.device), rows))


# ---- measuring ---------------------------------------------------------------------------------------------


def best_rate(dtype: torch.dtype, device: str, side: int) -> float:
    """Operations per second of a (side x side) product in `dtype`, by the fastest available operator."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    variants = cpu.LINEAR_BFLOAT16 if dtype == torch.bfloat16 else cpu.LINEAR_FLOAT32
    best = float("inf")
    for linear in variants.values() if device == "cpu" else [F.linear]:
        with contextlib.suppress(RuntimeError):  # the processor may lack the format
            best = min(best, best_seconds(lambda linear=linear: linear(a, b, None), 3, device))
    return 2 * side**3 / best


def count_operations(config: UniTokConfig, side: int) -> dict[str, float]:
    """Floating-point operations per image, counted on meta tensors."""
    with torch.device("meta"), torch.no_grad():
        model = UniTok(config).eval()
        pixels = torch.empty(1, 3, side, side)
        count = side // config.patch_size
        codes = torch.zeros(1, count**2 + config.num_register_tokens, config.num_codebooks, dtype=torch.int64)
        found = {}
        with FlopCounterMode(display=False) as counter:
            model.encode(pixels)
        found["encode"] = float(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            model.decode_latents(model.quantizer.embed(codes), (count, count))
        found["decode"] = float(counter.get_total_flops())
    return found


def alternate(
    ours: Callable[[], Tensor], baseline: Callable[[], Tensor], repeats: int
) -> tuple[dict[str, float], Tensor, Tensor]:
    """Median seconds of alternating calls, peak memory of each, and both results."""
    works, results = {"baseline": baseline, "ours": ours}, {}
    times: dict[str, list[float]] = {name: [] for name in works}
    memory, cores = dict.fromkeys(works, 0.0), dict.fromkeys(works, 0.0)
    for _ in range(repeats):
        for name, work in works.items():
            reset_peak_memory()
            start, busy = time.perf_counter(), time.process_time()
            results[name] = work()
            times[name].append(time.perf_counter() - start)
            # CPU seconds per second: fewer than threads means that other processes took the cores
            cores[name] = (time.process_time() - busy) / times[name][-1]
            memory[name] = max(memory[name], peak_memory_gib() or 0.0)
    median = {name: statistics.median(times[name]) for name in works}
    row = {"seconds": median["ours"], "baseline_seconds": median["baseline"]}
    row |= {"ratio": median["baseline"] / median["ours"]}
    row |= {"memory_gib": memory["ours"], "baseline_memory_gib": memory["baseline"]}
    row |= {"cores": cores["ours"], "baseline_cores": cores["baseline"]}
    return row, results["ours"], results["baseline"]


@torch.no_grad()
def random_model(config: UniTokConfig, device: str = "cpu") -> UniTok:
    """A model with random weights that keep the scale of activations; faster than its own initialisation."""
    with torch.device("meta"):
        model = UniTok(config)
    model.to_empty(device=device)
    # uniform with variance 1 / fan-in
    for name, tensor in model.state_dict().items():
        if tensor.dim() > 1 and tensor.is_floating_point():
            bound = math.sqrt(3 / math.prod(tensor.shape[1:]))
            tensor.uniform_(-bound, bound)
        else:
            tensor.fill_(1 if name.endswith("weight") else 0)
    nn.init.normal_(model.quantizer.codebooks)
    return model.eval()


# ---- CPU ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def code_margins(model: UniTok, latents: Tensor) -> Tensor:
    """(B, N, K*C) -> (B, N, K): cosine similarity of the nearest entry minus that of the second nearest."""
    features = model.quantizer.split(latents)
    table = F.normalize(model.quantizer.codebooks, dim=-1)
    pairs = (
        torch.einsum("bnc,vc->bnv", features[:, :, k], table[k]).topk(2).values for k in range(len(table))
    )
    return torch.stack([pair[..., 0] - pair[..., 1] for pair in pairs], dim=2)


def run_cpu(args: argparse.Namespace, config: UniTokConfig) -> list[dict[str, Any]]:
    """Every part, batch size and number format, against the baseline in float32."""
    torch.manual_seed(0)
    reference = random_model(config)
    models = {"float32": reference}
    if "bfloat16" in args.dtype:
        models["bfloat16"] = copy.deepcopy(reference).to(torch.bfloat16)
    needed = count_operations(config, args.side)
    rates = {dtype: best_rate(getattr(torch, dtype), "cpu", args.product) for dtype in args.dtype}
    rows = []
    for batch in args.batch:
        pixels = torch.rand(batch, 3, args.side, args.side) * 2 - 1
        for dtype in args.dtype:
            for row in compare(models[dtype], reference, pixels, args.part, args.repeats):
                floor = needed[row["part"]] * batch / rates[dtype]
                row |= {"dtype": dtype, "batch": batch, "over_floor": row["seconds"] / floor}
                row |= {"floor_seconds": floor, "best_gflops": rates[dtype] / 1e9, "load": load_average()}
                rows.append(row)
                print_row(row)
    print("operators:", cpu.float32_operator(), "(float32),", cpu.bfloat16_operator(), "(bfloat16)")
    return rows


def compare(
    model: UniTok, reference: UniTok, pixels: Tensor, parts: list[str], repeats: int
) -> list[dict[str, Any]]:
    """Encoding and decoding by `model`, in its number format, and by the baseline on `reference`."""
    grid = tuple(side // model.config.patch_size for side in pixels.shape[2:])
    typed = pixels.to(model.decoder.norm.weight.dtype)
    rows: list[dict[str, Any]] = []
    if "encode" in parts:
        latents = baseline_latents(reference, pixels)
        codes, clear = reference.quantizer.encode(latents), code_margins(reference, latents) > MARGIN
        model.encode(typed[:1])  # warm up: libraries prepare their kernels at first use
        row, found, _ = alternate(
            lambda: model.encode(typed), lambda: baseline_encode(reference, pixels), repeats
        )
        same = (found == codes).float()
        row |= {"codes_equal": same.mean().item(), "codes_equal_beyond_margin": same[clear].mean().item()}
        rows.append({"part": "encode", **row, "beyond_margin": clear.float().mean().item()})
    if "decode" in parts:
        config = model.config
        shape = (len(pixels), math.prod(grid) + config.num_register_tokens, config.num_codebooks)
        codes = torch.randint(config.codebook_size, shape)
        model.decode(codes[:1], grid)
        row, decoded, expected = alternate(
            lambda: model.decode(codes, grid), lambda: baseline_decode(reference, codes, grid), repeats
        )
        row["largest_difference"] = (decoded.float() - expected).abs().max().item()
        rows.append({"part": "decode", **row})
    return rows


# ---- GPU ---------------------------------------------------------------------------------------------------


def run_cuda(args: argparse.Namespace, config: UniTokConfig) -> list[dict[str, Any]]:
    """Images per second and MFU of encoding, decoding and a training step, with torch.compile in bf16."""
    torch.manual_seed(0)
    eager = random_model(config).to("cuda")
    fast = copy.deepcopy(eager)
    fast.encoder.compile()
    fast.decoder.compile()
    needed = count_operations(config, args.side)
    needed["train"] = 3 * (needed["encode"] + needed["decode"])  # the backward pass costs two forward passes
    rate = best_rate(torch.bfloat16, "cuda", 4 * args.product)
    peak = peak_tflops(torch.device("cuda"))
    nominal = peak * 1e12 if peak else rate  # MFU relative to the data sheet's peak, or to the measured rate
    rows = []
    for batch in args.batch:
        pixels = torch.rand(batch, 3, args.side, args.side, device="cuda") * 2 - 1
        for row in parts_on_cuda(fast, eager, pixels, max(args.repeats, 5)):
            work = needed[row["part"]] * batch
            row |= {"dtype": "bfloat16", "batch": batch, "images_per_s": batch / row["seconds"]}
            row |= {"mfu": work / row["seconds"] / nominal, "over_floor": row["seconds"] * rate / work}
            rows.append(row)
            print_row(row)
    return rows


def parts_on_cuda(fast: UniTok, eager: UniTok, pixels: Tensor, repeats: int) -> list[dict[str, Any]]:
    """Seconds and memory of `fast` in bf16, and seconds of `eager` in float32 for encoding and decoding."""

    @torch.autocast("cuda", dtype=torch.bfloat16)
    def encode() -> Tensor:
        return fast.encode(pixels)

    @torch.autocast("cuda", dtype=torch.bfloat16)
    def decode() -> Tensor:
        return fast.decode(codes, grid)

    grid = tuple(side // eager.config.patch_size for side in pixels.shape[2:])
    codes = eager.encode(pixels)
    ours = {"encode": encode, "decode": decode, "train": training_step(fast, pixels)}
    baseline = {"encode": lambda: eager.encode(pixels), "decode": lambda: eager.decode(codes, grid)}
    rows = []
    for name, work in ours.items():
        fast.train(name == "train")
        for _ in range(3):  # warm up: compilation
            work()
        torch.cuda.reset_peak_memory_stats()
        row = {
            "part": name,
            "seconds": statistics.median(measure_seconds(work, "cuda") for _ in range(repeats)),
        }
        row["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if name in baseline:
            row["eager_seconds"] = best_seconds(baseline[name], 3, "cuda")
            row["ratio"] = row["eager_seconds"] / row["seconds"]
        if name == "encode":
            row["codes_equal"] = (encode() == codes).float().mean().item()
        rows.append(row)
    return rows


def training_step(model: UniTok, pixels: Tensor) -> Callable[[], Any]:
    """One update on images and captions: reconstruction, LPIPS, quantiser and contrastive losses, AdamW."""
    lpips = LPIPS().to(pixels.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    ids = torch.randint(1, model.config.text_vocab_size, (len(pixels), model.config.text_context_length))
    ids, labels = ids.to(pixels.device), torch.arange(len(pixels), device=pixels.device)

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = model(pixels, ids)
            perceptual = lpips(out.reconstruction, pixels).mean()
        difference = out.reconstruction.float() - pixels
        logits = out.logit_scale * out.image_embeds @ out.text_embeds.T
        clip = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        loss = (
            0.2 * difference.abs().mean() + difference.square().mean() + perceptual + out.losses["vq"] + clip
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# ---- results -----------------------------------------------------------------------------------------------


def print_row(row: dict[str, Any]) -> None:
    cells = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
    print("  ".join(f"{key} {value}" for key, value in cells.items()), flush=True)


def save(args: argparse.Namespace, name: str, rows: list[dict[str, Any]]) -> Path:
    """Add the rows to the device's file; they replace older rows of the same case."""
    path = result_file("tokenizer", name, args.out)
    head = {"device": name, "torch": torch.__version__, "threads": args.threads}
    old = read_results(path).get("rows", [])
    for row in rows:
        row |= {"size": args.size, "side": args.side}

    def case(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[key] for key in ("size", "side", "batch", "dtype", "part"))

    kept = [row for row in old if case(row) not in {case(new) for new in rows}]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**head, "rows": sorted(kept + rows, key=case)}, indent=1) + "\n")
    return path


if __name__ == "__main__":
    main()
