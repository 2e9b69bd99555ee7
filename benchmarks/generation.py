"""Speed of drawing and answering, each as a ratio to a plain loop measured in the same run.

    python benchmarks/generation.py [--parts NAME ...] [--out FILE]      # about 3 minutes on two cores
    python benchmarks/generation.py --agreement MODEL   # codes of bf16 and int8 against fp32, teacher-forced
    python benchmarks/generation.py --gpu                                # the 7B shape on a CUDA device

Every part runs in a process of its own, alone, and reports its peak memory. Model: hidden 512, intermediate
1376, 8 layers, 8 heads, vocabulary 32000, 8 x 4096 codes, depth head of 3 layers, 256 positions, guidance 5,
random weights, 2 threads.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from generation_baseline import plain_loop

PROMPT, FREE = list(range(10, 30)), [1, 5, 6, 3]
GUIDANCE = 5.0
# part -> (images, weights, positions drawn); a baseline's time hardly depends on the position
DRAWING = {
    "baseline_1": (1, "baseline", 40),
    "fp32_1": (1, "fp32", 256),
    "bf16_1": (1, "bf16", 256),
    "int8_1": (1, "int8", 256),
    "eager_1": (1, "eager", 40),  # without a compiler
    "baseline_8": (8, "baseline", 64),  # as many as the others: memory is compared
    "fp32_8": (8, "fp32", 64),
    "bf16_8": (8, "bf16", 64),
    "int8_8": (8, "int8", 64),
}
BARS = {"fp32_1": 3, "bf16_1": 5, "int8_1": 8, "fp32_8": 2, "bf16_8": 5}
PARTS = ("machine", *DRAWING, "answers", "prefix")


def main() -> None:
    """Run the parts one after the other and print their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="a JSON file for the numbers; those of other parts in it stay")
    parser.add_argument("--gpu", action="store_true", help="the 7B shape on a CUDA device")
    parser.add_argument("--agreement", metavar="MODEL", help="compare the precisions on a trained model")
    args = parser.parse_args()
    if args.agreement:
        print(json.dumps(agreement(args.agreement)))
        return
    if args.part or args.gpu:
        import torch

        torch.set_num_threads(args.threads)
        print(json.dumps(gpu() if args.gpu else run(args.part)))
        return
    found = json.loads(Path(args.out).read_text()) if args.out and Path(args.out).exists() else {}
    for part in args.parts:
        command = [sys.executable, __file__, "--part", part, "--threads", str(args.threads)]
        print(f"{part} (load {os.getloadavg()[0]:.1f}) ...", file=sys.stderr, flush=True)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{part} failed:\n{done.stderr}")
        found[part] = json.loads(done.stdout.splitlines()[-1]) | {"load": round(os.getloadavg()[0], 1)}
        if args.out:
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in found.items())
            Path(args.out).write_text(f"{{\n{rows}\n}}\n")
    print(report(found))


def run(part: str) -> dict:
    """The numbers of one part."""
    if part == "machine":
        return machine()
    if part in DRAWING:
        return drawing(*DRAWING[part])
    return answers() if part == "answers" else prefix()


def benchmark_model(**changes):
    """The model of the benchmark with fixed random weights."""
    import torch

    from open_unitok import UniTokForConditionalGeneration, UniTokMLLMConfig

    text = {
        "model_type": "llama", "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
        "num_attention_heads": 8, "vocab_size": 32000, "max_position_embeddings": 1024,
        "bos_token_id": 1, "eos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(1)
    return UniTokForConditionalGeneration(UniTokMLLMConfig(text_config={**text, **changes})).eval()


def processor() -> str:
    """The processor's name, family and model, as far as the system tells."""
    import platform

    info = Path("/proc/cpuinfo")
    rows = (
        (line.split(":", 1) for line in info.read_text().splitlines() if ":" in line) if info.exists() else ()
    )
    known = {key.strip(): value.strip() for key, value in rows}
    name = known.get("model name", platform.processor() or platform.machine())
    return f"{name} family {known.get('cpu family', '?')} model {known.get('model', '?')}"


def machine() -> dict:
    """Read bandwidth in GB/s, from memory and from the last cache, and fp32 GFLOP/s of a product."""
    import torch

    numbers = torch.ones(96 * 2**20)
    x, w = torch.randn(256, 1024), torch.randn(3072, 1024)

    def best(work, times):
        seconds = []
        for _ in range(times):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    return {
        "memory_gb_s": 4 * numbers.numel() / best(numbers.sum, 8) / 1e9,
        "cache_gb_s": 2**24 / best(numbers[: 2**22].sum, 60) / 1e9,
        "fp32_gflop_s": 2 * 256 * 1024 * 3072 / best(lambda: torch.nn.functional.linear(x, w), 30) / 1e9,
        "cpu": f"{processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
    }


def drawing(images: int, weights: str, positions: int) -> dict:
    """Milliseconds per position of greedy drawing with guidance, the codes, peak memory in MB."""
    import torch

    if weights == "eager":
        os.environ["UNITOK_NATIVE"] = "0"
    from open_unitok.generation import Sampling, iter_image_codes

    model = benchmark_model()
    if weights == "bf16":
        model = model.to(torch.bfloat16)
    sampling = Sampling(guidance=GUIDANCE, greedy=True)
    prompts = [[*PROMPT, i, 3] for i in range(images)]
    if weights == "baseline":
        steps = plain_loop(model, prompts, FREE, images, GUIDANCE)
    else:
        rounding = "int8" if weights == "int8" else None
        steps = iter_image_codes(model, prompts, sampling, [0] * images, FREE, quantization=rounding)
    times, codes, spent = [], None, watch_engine()
    for _ in range(positions):
        start = time.perf_counter()
        codes = next(steps)
        times.append(1000 * (time.perf_counter() - start))
    assert codes is not None
    parts = {name: statistics.median(ms) for name, ms in spent.items() if ms}
    quarter = max(1, (positions - 1) // 4)
    first, last = statistics.median(times[1 : 1 + quarter]), statistics.median(times[-quarter:])
    return {
        "ms": statistics.median(times[1:]), "best_ms": min(times[1:]), "last_over_first": last / first,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "codes": codes[:, :40].tolist(),
        "weights": dict(zip(("decoder", "embedder", "depth"), weights_read(model))), "profile_ms": parts,
    }  # fmt: skip


def watch_engine() -> dict[str, list[float]]:
    """Milliseconds of each step of the C++ engine from now on: embedder with decoder, and a code's logits."""
    from open_unitok.generation.backends.native import Native

    spent: dict[str, list[float]] = {"decode_step": [], "code_logits": []}

    def watched(name, work):
        def run(*args):
            start = time.perf_counter()
            result = work(*args)
            spent[name].append(1000 * (time.perf_counter() - start))
            return result

        return run

    for name in spent:
        setattr(Native, name, watched(name, getattr(Native, name)))
    return spent


def weights_read(model) -> tuple[int, int, int]:
    """Weights that a position of one image reads from decoder, visual embedder and (K times) depth head."""
    from torch import nn

    parts = (model.language_model.layers, model.visual_embedder, model.depth_head)
    sizes = [sum(m.weight.numel() for m in p.modules() if isinstance(m, nn.Linear)) for p in parts]
    return sizes[0], sizes[1], sizes[2] * model.config.num_codebooks


def asked(count: int, images: int):
    """Questions of 8 to 64 ids behind 256 visual tokens, and the codes of their images."""
    import torch

    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 65, (count,), generator=generator).tolist()
    ids = [torch.randint(10, 32000, (n,), generator=generator).tolist() for n in lengths]
    codes = torch.randint(4096, (images, 256, 8), generator=generator)
    prompts = [[1, 7, 8, 9, *[-200] * 256, 13, *row] for row in ids]
    return prompts, [codes[i % images][None] for i in range(count)]


def seconds(work, times: int = 3) -> float:
    """The best of some runs."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


# name -> (images that 32 questions are about, new ids each)
ASKING = {"photos": (32, 16), "dialogues": (8, 32)}


def answers() -> dict:
    """Seconds for 32 questions of mixed length, in batches and one by one (every fourth, times four).

    "photos": each question about an image of its own, 16 new ids. "dialogues": four questions an image, 32
    new ids, the default of `answer`. "plain" is transformers' `generate` with one question at a time. "floor"
    is of the batch: multiplications at this run's GFLOP/s.
    """
    from open_unitok.generation import generate_text_ids

    model, found = benchmark_model(), {}
    decoder, embedder, _ = weights_read(model)
    speed = machine()["fp32_gflop_s"] * 1e9
    few = range(0, 32, 4)
    for name, (images, new) in ASKING.items():
        prompts, codes = asked(32, images)

        def alone(prompts=prompts, codes=codes, new=new, **options):
            return [generate_text_ids(model, [prompts[i]], [codes[i]], new, **options) for i in few]

        together = seconds(lambda: generate_text_ids(model, prompts, codes, new), 2)  # noqa: B023
        read = images * 256 * (decoder + embedder) + sum(len(p) - 256 for p in prompts) * decoder
        written = 32 * (new * model.lm_head.weight.numel() + (new - 1) * decoder)
        found[name] = {
            "together_s": together,
            "one_by_one_s": 4 * seconds(alone, 2),
            "plain_one_by_one_s": 4 * seconds(lambda: alone(use_cache=True), 2),
            "floor_reading_s": 2 * read / speed,
            "floor_writing_s": 2 * written / speed,
        }
    return found


def prefix() -> dict:
    """Seconds for four questions about one image, 4 new ids each: with its prefix read once, and without."""
    from open_unitok.generation import generate_text_ids

    model = benchmark_model()
    prompts, codes = asked(4, 1)
    return {
        "shared_s": seconds(lambda: generate_text_ids(model, prompts, codes, 4)),
        "batch_s": seconds(lambda: generate_text_ids(model, prompts, codes, 4, share_prefix=False)),
        "one_by_one_s": seconds(
            lambda: [
                generate_text_ids(model, [p], [c], 4, share_prefix=False) for p, c in zip(prompts, codes)
            ]
        ),
    }


def agreement(folder: str) -> dict:
    """Shares of codes that bf16 and int8 weights choose as fp32 does, teacher-forced on fp32's greedy
    drawings with guidance; and of those that a seed draws alone as within a batch."""
    import torch

    from open_unitok import Pipeline
    from open_unitok.generation import Sampling, generate_image_codes
    from open_unitok.generation.backends import BACKENDS, choose_backend
    from open_unitok.generation.sampling import apply_guidance

    pipe = Pipeline.from_pretrained(folder)
    ids = pipe.prompt_ids(["a red circle", "two blue squares", "a green star above a yellow circle"])
    rows = [*ids, *[pipe.processor.unconditional_ids()] * len(ids)]
    sampling = Sampling(guidance=GUIDANCE, greedy=True)
    codes = generate_image_codes(pipe.model, ids, sampling, [0] * len(ids), rows[-1])
    found = {}
    for name in ("fp32", "bf16", "int8"):
        model = pipe.model.to(torch.bfloat16) if name == "bf16" else pipe.model
        if name == "int8":
            model = Pipeline.from_pretrained(folder).model
        quantization = "int8" if name == "int8" else None
        backend, hits = BACKENDS[choose_backend(model, quantization=quantization)](model, quantization), 0
        with torch.no_grad():
            backend.prefill(rows, codes[:, :0])
            for t in range(codes.shape[1]):
                if t:
                    backend.decode_step(codes[:, t - 1])
                for k in range(codes.shape[2]):
                    logits = backend.code_logits(k, None if k == 0 else codes[:, t, k - 1]).float()
                    hits += int((apply_guidance(logits, GUIDANCE).argmax(-1) == codes[:, t, k]).sum())
        found[name] = hits / codes.numel()
        if name != "int8":
            sampled = Sampling(guidance=GUIDANCE)
            together = generate_image_codes(model, ids, sampled, range(len(ids)), rows[-1])
            alone = [generate_image_codes(model, [row], sampled, [i], rows[-1]) for i, row in enumerate(ids)]
            found[f"{name}, alone as in a batch"] = (torch.cat(alone) == together).float().mean().item()
    return found


def profile(part: str, now: dict) -> str:
    """Where a position's time goes; the rest is guidance, argmax and Python."""
    codes, spent = len(now["codes"][0][0]), now["profile_ms"]
    depth = codes * spent["code_logits"]
    rest = now["ms"] - spent["decode_step"] - depth
    return (
        f"{part}: embedder and decoder {spent['decode_step']:.1f} ms, depth head {depth:.1f}, "
        f"choosing and Python {rest:.1f}"
    )


def report(found: dict) -> str:
    """A table of what was measured."""
    lines, here = [], found.get("machine", {})
    if here:
        lines.append(
            f"machine: {here['memory_gb_s']:.0f} GB/s from memory, {here['cache_gb_s']:.0f} from cache, "
            f"{here['fp32_gflop_s']:.0f} fp32 GFLOP/s, {here['cpu']}"
        )
        limit = 70 * 188 / here["fp32_gflop_s"]
        if "baseline_1" in found:
            lines.append(f"baseline {found['baseline_1']['ms']:.1f} ms; it may take {limit:.1f} ms here")
    lines.append("part               ms  ratio  bar   floor  over last/first     MB same codes")
    for part, (images, weights, _) in DRAWING.items():
        if part not in found:
            continue
        now, base = found[part], found.get(f"baseline_{images}")
        size = {"bf16": 2, "int8": 1}.get(weights, 4)
        floor = sum(now["weights"].values()) * size / here["memory_gb_s"] / 1e6 if here else float("nan")
        ratio = base["ms"] / now["ms"] if base else float("nan")
        count = min(len(now["codes"][0]), len(base["codes"][0])) if base else 0
        same = base and all(a[:count] == b[:count] for a, b in zip(now["codes"], base["codes"]))
        lines.append(
            f"{part:12} {now['ms']:8.2f} {ratio:6.2f} {BARS.get(part, ''):>4} {floor:7.2f} "
            f"{now['ms'] / floor:5.2f} {now['last_over_first']:10.2f} {now['peak_mb']:6.0f} {same}"
        )
    rest = {"prefix": (2, found["prefix"])} if "prefix" in found else {}
    asked_for = found.get("answers", {})
    lines += [profile(part, found[part]) for part in DRAWING if found.get(part, {}).get("profile_ms")]
    for part, (bar, times) in {**{n: (3, asked_for[n]) for n in ASKING if n in asked_for}, **rest}.items():
        now = {k: v for k, v in times.items() if k.endswith("_s")}
        first = next(iter(now.values()))
        ratios = ", ".join(f"{name[:-2]} {value:.2f} s = {value / first:.2f}x" for name, value in now.items())
        lines.append(f"{part} (bar {bar}): {ratios}")
    return "\n".join(lines)


def gpu() -> dict:
    """Seconds per image of the 7B shape in bfloat16, against the plain loop and the bandwidth floor."""
    import torch

    from open_unitok import UniTokForConditionalGeneration, UniTokMLLMConfig
    from open_unitok.generation import Sampling, iter_image_codes

    assert torch.cuda.is_available(), "--gpu needs a CUDA device"
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = UniTokForConditionalGeneration(UniTokMLLMConfig.named("unitok_mllm_7b")).eval()
        torch.set_default_dtype(torch.float32)
    numbers = torch.ones(2**31, dtype=torch.uint8, device="cuda")

    def timed(work) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    bandwidth = (
        numbers.numel() / min(timed(lambda: numbers.view(torch.float32).sum()) for _ in range(5)) / 1e9
    )
    found: dict = {"device": torch.cuda.get_device_name(), "memory_gb_s": bandwidth}
    floor = 2 * sum(weights_read(model)) * 256 / bandwidth / 1e9
    sampling = Sampling(guidance=GUIDANCE)
    for images in (1, 4, 16, 64):
        prompts = [[*PROMPT, i, 3] for i in range(images)]

        def ours(prompts=prompts):
            for _ in iter_image_codes(model, prompts, sampling, list(range(len(prompts))), FREE):
                pass

        def plain(prompts=prompts, images=images):
            for _, _ in zip(range(32), plain_loop(model, prompts, FREE, images, GUIDANCE)):
                pass

        timed(ours)
        spent, base = timed(ours), 8 * timed(plain)
        found[f"batch_{images}"] = {
            "s_per_image": spent / images, "over_floor": spent / floor, "ratio_to_baseline": base / spent,
        }  # fmt: skip
    name = found["device"].replace(" ", "-").lower()
    path = Path(__file__).parent / "results" / f"generation-{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
