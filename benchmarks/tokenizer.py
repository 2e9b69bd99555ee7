"""Speed of the visual tokenizer, against the plain version in the same run.

    python benchmarks/tokenizer.py                             # CPU, vitamin_large, 256 px, 2 threads
    python benchmarks/tokenizer.py --device cuda --batch 64    # torch.compile, bf16, a training step too

On a CPU every figure is a ratio to the plain module-by-module version in float32 (`F.linear`, contiguous
maps, convolutions on doubled maps) of tokenizer_plain.py, which takes turns with ours. Floor: the fewest
operations that the sizes need over the best rate of a large matrix product in the same format and run. The
weights are random: they change nothing in the work.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizer_plain import plain_decode, plain_encode, plain_latents
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from open_unitok.tokenizer import UniTok, UniTokConfig, cpu
from open_unitok.training.core.flops import peak_tflops

RESULTS = Path(__file__).parent / "results"


# Measuring


def seconds(work: Callable[[], Any], device: str = "cpu") -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def best_rate(dtype: torch.dtype, device: str, side: int) -> float:
    """Operations per second of a (side x side) product in `dtype`, by the best operator there is."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    ways = cpu.LINEAR_BFLOAT16 if dtype == torch.bfloat16 else cpu.LINEAR_FLOAT32
    best = float("inf")
    for way in ways.values() if device == "cpu" else [F.linear]:
        with contextlib.suppress(RuntimeError):  # the processor may not have the format
            best = min(best, *(seconds(lambda way=way: way(a, b, None), device) for _ in range(3)))
    return 2 * side**3 / best


def operations(config: UniTokConfig, side: int) -> dict[str, float]:
    """Floating-point operations per image, counted on shapes alone."""
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


def reset_peak() -> None:
    """Forget the highest memory use so far (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_gib() -> float | None:
    """Highest resident memory since `reset_peak`; None where the system does not tell."""
    try:
        line = next(x for x in Path("/proc/self/status").read_text().split("\n") if x.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) / 2**20


def processor() -> str:
    """The CPU's name, with the vector instructions that torch uses: names alone do not tell them."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n")
        fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        name = f"{fields['model name']} family {fields['cpu family']} model {fields['model']}"
    except (OSError, KeyError):
        pass
    return f"{name} {torch.backends.cpu.get_cpu_capability()}"


def alternate(
    ours: Callable[[], Tensor], plain: Callable[[], Tensor], repeats: int
) -> tuple[dict[str, float], Tensor, Tensor]:
    """Medians of both in turns, each one's highest memory, and what both gave."""
    works, given = {"plain": plain, "ours": ours}, {}
    times: dict[str, list[float]] = {name: [] for name in works}
    memory, cores = dict.fromkeys(works, 0.0), dict.fromkeys(works, 0.0)
    for _ in range(repeats):
        for name, work in works.items():
            reset_peak()
            start, busy = time.perf_counter(), time.process_time()
            given[name] = work()
            times[name].append(time.perf_counter() - start)
            cores[name] = (time.process_time() - busy) / times[name][-1]
            memory[name] = max(memory[name], peak_gib() or 0.0)
    middle = {name: statistics.median(times[name]) for name in works}
    row = {"seconds": middle["ours"], "plain_seconds": middle["plain"]}
    row |= {"ratio": middle["plain"] / middle["ours"]}
    row |= {"memory_gib": memory["ours"], "plain_memory_gib": memory["plain"]}
    row |= {"cores": cores["ours"], "plain_cores": cores["plain"]}  # fewer than threads: others were at work
    return row, given["ours"], given["plain"]


@torch.no_grad()
def random_model(config: UniTokConfig) -> UniTok:
    """A model whose activations keep their scale, filled faster than the training's start would be."""
    with torch.device("meta"):
        model = UniTok(config)
    model.to_empty(device="cpu")
    for name, tensor in model.state_dict().items():
        if tensor.dim() > 1 and tensor.is_floating_point():
            bound = math.sqrt(3 / math.prod(tensor.shape[1:]))
            tensor.uniform_(-bound, bound)
        else:
            tensor.fill_(1 if name.endswith("weight") else 0)
    nn.init.normal_(model.quantizer.codebooks)
    return model.eval()


# CPU


@torch.no_grad()
def margins(model: UniTok, latents: Tensor) -> Tensor:
    """(B, N, K*C) -> (B, N, K): by how much the nearest entry is nearer than the next."""
    features = model.quantizer.split(latents)
    table = F.normalize(model.quantizer.codebooks, dim=-1)
    pairs = (
        torch.einsum("bnc,vc->bnv", features[:, :, k], table[k]).topk(2).values for k in range(len(table))
    )
    return torch.stack([pair[..., 0] - pair[..., 1] for pair in pairs], dim=2)


def run_cpu(args: argparse.Namespace, config: UniTokConfig) -> list[dict[str, Any]]:
    """Every part, batch and number format, against the plain version in float32."""
    torch.manual_seed(0)
    plain = random_model(config)
    models = {"float32": plain}
    if "bfloat16" in args.dtype:
        models["bfloat16"] = copy.deepcopy(plain).to(torch.bfloat16)
    needed = operations(config, args.side)
    rates = {dtype: best_rate(getattr(torch, dtype), "cpu", args.product) for dtype in args.dtype}
    rows = []
    for batch in args.batch:
        pixels = torch.rand(batch, 3, args.side, args.side) * 2 - 1
        for dtype in args.dtype:
            for row in compare(models[dtype], plain, pixels, args.part, args.repeats):
                floor = needed[row["part"]] * batch / rates[dtype]
                row |= {"dtype": dtype, "batch": batch, "over_floor": row["seconds"] / floor}
                row |= {"floor_seconds": floor, "best_gflops": rates[dtype] / 1e9, "load": os.getloadavg()[0]}
                rows.append(row)
                show(row)
    for key, way in cpu.chosen().items():
        print("chosen:", *key, "->", way)
    return rows


def compare(
    model: UniTok, plain: UniTok, pixels: Tensor, parts: list[str], repeats: int
) -> list[dict[str, Any]]:
    """Encoding and decoding by `model`, in its format, and by the plain version."""
    grid = tuple(side // model.config.patch_size for side in pixels.shape[2:])
    typed = pixels.to(model.decoder.norm.weight.dtype)
    rows: list[dict[str, Any]] = []
    if "encode" in parts:
        latents = plain_latents(plain, pixels)
        codes, sure = plain.quantizer.encode(latents), margins(plain, latents) > 1e-4
        model.encode(typed[:1])  # the first use: operators are chosen here
        row, found, _ = alternate(lambda: model.encode(typed), lambda: plain_encode(plain, pixels), repeats)
        same = (found == codes).float()
        row |= {"codes_equal": same.mean().item(), "codes_equal_where_sure": same[sure].mean().item()}
        rows.append({"part": "encode", **row, "sure": sure.float().mean().item()})
    if "decode" in parts:
        config = model.config
        shape = (len(pixels), math.prod(grid) + config.num_register_tokens, config.num_codebooks)
        codes = torch.randint(config.codebook_size, shape)
        model.decode(codes[:1], grid)
        row, copies, expected = alternate(
            lambda: model.decode(codes, grid), lambda: plain_decode(plain, codes, grid), repeats
        )
        row["largest_difference"] = (copies.float() - expected).abs().max().item()
        rows.append({"part": "decode", **row})
    return rows


# GPU


def run_cuda(args: argparse.Namespace, config: UniTokConfig) -> list[dict[str, Any]]:
    """Images per second and MFU of encoding, decoding and a training step, in bf16, compiled."""
    torch.manual_seed(0)
    eager = random_model(config).to("cuda")
    fast = copy.deepcopy(eager)
    fast.encoder.compile()
    fast.decoder.compile()
    needed = operations(config, args.side)
    needed["train"] = 3 * (needed["encode"] + needed["decode"])  # backward is twice forward
    rate = best_rate(torch.bfloat16, "cuda", 4 * args.product)
    peak = peak_tflops(torch.device("cuda"))
    stated = peak * 1e12 if peak else rate  # MFU is relative to what makers state, or to the measured rate
    rows = []
    for batch in args.batch:
        pixels = torch.rand(batch, 3, args.side, args.side, device="cuda") * 2 - 1
        for row in parts_on_cuda(fast, eager, pixels, max(args.repeats, 5)):
            work = needed[row["part"]] * batch
            row |= {"dtype": "bfloat16", "batch": batch, "images_per_s": batch / row["seconds"]}
            row |= {"mfu": work / row["seconds"] / stated, "over_floor": row["seconds"] * rate / work}
            rows.append(row)
            show(row)
    return rows


def parts_on_cuda(fast: UniTok, eager: UniTok, pixels: Tensor, repeats: int) -> list[dict[str, Any]]:
    """Seconds and memory of `fast` in bf16, beside those of `eager` in float32 where it takes part."""

    @torch.autocast("cuda", dtype=torch.bfloat16)
    def encode() -> Tensor:
        return fast.encode(pixels)

    @torch.autocast("cuda", dtype=torch.bfloat16)
    def decode() -> Tensor:
        return fast.decode(codes, grid)

    grid = tuple(side // eager.config.patch_size for side in pixels.shape[2:])
    codes = eager.encode(pixels)
    ours = {"encode": encode, "decode": decode, "train": training_step(fast, pixels)}
    plain = {"encode": lambda: eager.encode(pixels), "decode": lambda: eager.decode(codes, grid)}
    rows = []
    for name, work in ours.items():
        fast.train(name == "train")
        for _ in range(3):  # compiles
            work()
        torch.cuda.reset_peak_memory_stats()
        row = {"part": name, "seconds": statistics.median(seconds(work, "cuda") for _ in range(repeats))}
        row["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if name in plain:
            row["eager_seconds"] = min(seconds(plain[name], "cuda") for _ in range(3))
            row["ratio"] = row["eager_seconds"] / row["seconds"]
        if name == "encode":
            row["codes_equal"] = (encode() == codes).float().mean().item()
        rows.append(row)
    return rows


def training_step(model: UniTok, pixels: Tensor) -> Callable[[], Any]:
    """One update on images and captions: reconstruction, LPIPS, quantiser and contrast, AdamW."""
    from open_unitok.tokenizer.frozen.lpips import LPIPS

    lpips = LPIPS().to(pixels.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    ids = torch.randint(1, model.config.text_vocab_size, (len(pixels), model.config.text_context_length))
    ids, labels = ids.to(pixels.device), torch.arange(len(pixels), device=pixels.device)

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = model(pixels, ids)
            near = lpips(out.reconstruction, pixels).mean()
        difference = out.reconstruction.float() - pixels
        logits = out.logit_scale * out.image_embeds @ out.text_embeds.T
        clip = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        loss = 0.2 * difference.abs().mean() + difference.square().mean() + near + out.losses["vq"] + clip
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# The rest


def show(row: dict[str, Any]) -> None:
    shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
    print("  ".join(f"{key} {value}" for key, value in shown.items()), flush=True)


def save(args: argparse.Namespace, name: str, rows: list[dict[str, Any]]) -> Path:
    """Put the rows into the device's file, in the place of older ones of the same case."""
    path = args.out / f"tokenizer-{''.join(c if c.isalnum() else '-' for c in name)}.json"
    head = {"device": name, "torch": torch.__version__, "threads": args.threads}
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    for row in rows:
        row |= {"size": args.size, "side": args.side}

    def case(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[key] for key in ("size", "side", "batch", "dtype", "part"))

    kept = [row for row in old if case(row) not in {case(new) for new in rows}]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**head, "rows": sorted(kept + rows, key=case)}, indent=1) + "\n")
    return path


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
    parser.add_argument("--product", type=int, default=2048, help="side of the matrices behind the floor")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=NUMBER", help="fields of the config")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    changes: dict[str, Any] = {
        key: json.loads(value) for key, _, value in (x.partition("=") for x in args.set)
    }
    if args.device == "cpu":  # the text tower takes no part
        changes |= {"text_num_layers": 1, "text_vocab_size": 64}
    config = UniTokConfig.named(args.size, **changes)
    rows = run_cpu(args, config) if args.device == "cpu" else run_cuda(args, config)
    name = processor() if args.device == "cpu" else torch.cuda.get_device_name()
    print(save(args, name, rows))


if __name__ == "__main__":
    main()
