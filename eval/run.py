"""`unitok eval run`: answer a benchmark with a model, then score it; killed and run again, it goes on."""

import argparse
from dataclasses import fields
from pathlib import Path

from open_unitok import ranks
from open_unitok.errors import UserError

from .benchmarks import BENCHMARKS, named, run_benchmark
from .harness import Row, Settings

SCORERS = "vqav2: lmms, official, gated; pope: official, strict; reconstruction: the SSIM's convention"
OPTIONS = {
    "split": (str, "where a folder holds several, for instance mscoco_val2014"),
    "recipe": (str, "words around a question: short (published) or plain (default for scenes)"),
    "max_new_tokens": (int, "longest answer (default: 128 as published, 16 for scenes)"),
    "images_per_prompt": (int, "drawings per prompt (default: 4 as published, 1 for scenes)"),
    "guidance": (float, "how strongly a drawing follows its prompt"),
    "temperature": (float, "of drawing"),
    "top_k": (int, "codes to choose among when drawing, 0 = all"),
    "top_p": (float, "probability to choose among when drawing"),
    "seed": (int, "of the first drawing; each has its own"),
    "limit": (int, "only the first samples, for a quick look"),
    "detector": (str, "scenes (default where DATA has a scenes.json) or none: detections come from a file"),
    "dtype": (str, "float32, bfloat16 or float16"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    names = "; ".join(f"{name}: {benchmark.line}" for name, benchmark in BENCHMARKS.items())
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"one or several, or all ({names})")
    parser.add_argument("--model", required=True, help="a tokenizer or MLLM folder")
    parser.add_argument("--data", required=True, help="the benchmark's folder, in its released layout")
    parser.add_argument("--out", required=True, help="answers and results go to OUT/NAME")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (default: cpu)")
    parser.add_argument("--batch-size", type=int, help="samples per call of the model")
    parser.add_argument("--scorer", default="", help=SCORERS)
    defaults = Settings()
    for field in fields(Settings):
        default = getattr(defaults, field.name)
        kind, line = OPTIONS[field.name]
        shown = "" if default is None else f" (default: {default})"
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=kind, default=default, help=line + shown
        )


def run(args: argparse.Namespace) -> None:
    """Run and print one table per benchmark."""
    from .models import Model

    names = list(BENCHMARKS) if args.names == ["all"] else args.names
    for name in names:
        named(name)
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}; it must be at least 1.")
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    model = Model(args.model, settings, args.device)
    for name in names:
        model.needs(BENCHMARKS[name].needs, name)
    for name in names:
        result = run_benchmark(
            name, model, args.data, Path(args.out) / name, settings, args.batch_size, args.scorer
        )
        if ranks.is_main():
            print(table(result))


def table(result: Row) -> str:
    """A result as lines of text: value, 95 % interval, n."""
    title = f"{result['benchmark']}  ({result['n']} samples, {result['missing']} missing)"
    lines = [title, "-" * len(title)]
    width = max(map(len, result["metrics"]), default=0)
    for name, metric in result["metrics"].items():
        interval = metric["interval"]
        around = f"[{number(interval[0], metric)}, {number(interval[1], metric)}]" if interval else ""
        lines.append(
            f"  {name:<{width}}  {number(metric['value'], metric):>9}  {around:<20}  n={metric['n']}"
        )
    return "\n".join([*lines, *(f"  ! {problem}" for problem in result["problems"])])


def number(value: float, metric: Row) -> str:
    """A value in its unit."""
    if metric["unit"] == "share":
        return f"{100 * value:.1f} %"
    return f"{value:.2f} dB" if metric["unit"] == "dB" else f"{value:.3f}"
