"""`unitok eval run`: answer a benchmark with a model, then score it; killed and run again, it goes on."""

import argparse
import contextlib
import datetime
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

from open_unitok.core import distributed
from open_unitok.core.errors import UserError
from open_unitok.core.files import model_path
from open_unitok.eval.core.annotations import PROMPT_TEMPLATES
from open_unitok.eval.core.generated_images import ExternalImages, holds_external_images
from open_unitok.eval.core.harness import SAMPLING_KEYS, Record, Scoring, Settings
from open_unitok.eval.registry import (
    BENCHMARKS,
    detect_benchmarks,
    find_benchmark,
    resolve_scorer,
    run_benchmark,
)

OPTIONS = {
    "split": (str, "where a folder holds several, for instance mscoco_val2014"),
    "prompt_template": (
        str,
        f"words around a question: {', '.join(PROMPT_TEMPLATES)}, ocr (default: the published one)",
    ),
    "layout": (str, "original or llava, where a folder holds the files of both"),
    "max_new_tokens": (int, "longest answer (default: 128 as published, 16 for scenes)"),
    "images_per_prompt": (int, "drawings per prompt (default: 4 as published, 1 for scenes)"),
    "guidance": (float, "how strongly a drawing follows its prompt (default: the model's own, else 5)"),
    "temperature": (float, "of drawing (default: the model's own, else 1)"),
    "top_k": (int, "codes to choose among when drawing (default: the model's own, else 0: all)"),
    "top_p": (float, "probability to choose among when drawing (default: the model's own, else 1)"),
    "greedy": (bool, "draw the likeliest codes (default: the model's own, else not)"),
    "guidance_schedule": (str, "constant, linear or cosine (default: the model's own, else constant)"),
    "seed": (int, "of the first drawing; each has its own"),
    "limit": (int, "only the first samples, for a quick look"),
    "detector": (str, "scenes (default where DATA has a scenes.json) or none: detections come from a file"),
    "image_format": (str, "drawings as jpg or png (default: as published)"),
    "grid": (int, "drawings from elsewhere are files of 2 x 2 images, each of this side (dpg_bench)"),
    "crop": (str, "to the tokenizer's square: bicubic, lanczos or adm (default: lanczos for labels)"),
    "pooling": (str, "what a linear probe reads: embedding, quantised or latents"),
    "dtype": (str, "float32, bfloat16 or float16"),
}


SCORERS = "; ".join(f"{n}: {', '.join(b.scorers)}" for n, b in BENCHMARKS.items() if len(b.scorers) > 1)
SCORING = {
    "scorer": f"variant of the scorer, the first is the default ({SCORERS})",
    "judge": "name of the model that judges (mmvet)",
    "judge_url": "an OpenAI-compatible endpoint, for instance http://localhost:8000/v1",
    "judge_replay": "a file of replies instead of an endpoint",
    "judge_runs": "how often every answer is judged",
    "judge_timeout": "seconds to wait for a reply",
    "inception_variant": "Inception of FID: torch-fidelity, pytorch-fid, clean, adm (default: by benchmark)",
    "inception_weights": "its weight file; without it no FID",
    "reference": "real images as a folder or .npz, or an .npz of their statistics",
    "lpips_weights": "the weight file lpips_with_vgg.pth; without it no LPIPS",
    "detector_model": "folder of a Mask2Former or OWL model that finds objects (geneval)",
    "colour_model": "folder of a CLIP model that names their colours (geneval)",
    "vqa_model": "folder of an image-text model that judges drawings (genai_bench, dpg_bench)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    names = "; ".join(f"{name}: {benchmark.line}" for name, benchmark in BENCHMARKS.items())
    parser.add_argument(
        "names", nargs="+", metavar="NAME", help=f"one or several, or all that DATA holds ({names})"
    )
    parser.add_argument(
        "--model",
        required=True,
        help="a tokenizer or MLLM folder; or drawings of another system (a folder, or an .npz) in its place",
    )
    parser.add_argument(
        "--data",
        required=True,
        help="the benchmark's folder as it is released, or one that holds a folder NAME",
    )
    parser.add_argument("--out", required=True, help="answers and results go to OUT/NAME")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (default: cpu)")
    parser.add_argument("--batch-size", type=int, help="samples per call of the model")
    defaults = Settings()
    for field in fields(Settings):
        default = None if field.name in SAMPLING_KEYS else getattr(defaults, field.name)
        kind, line = OPTIONS[field.name]
        shown = "" if default is None else f" (default: {default})"
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=default, help=line + shown, **how)
    add_scoring(parser)


def add_scoring(parser: argparse.ArgumentParser) -> None:
    """The options that shape the scores, not the answers."""
    for field in fields(Scoring):
        default = getattr(Scoring(), field.name)
        shown = f" (default: {default})" if default else ""
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(default),
            default=default,
            help=SCORING[field.name] + shown,
        )


def scoring_of(args: argparse.Namespace) -> Scoring:
    """What `add_scoring` read."""
    return Scoring(**{field.name: getattr(args, field.name) for field in fields(Scoring)})


def run(args: argparse.Namespace) -> None:
    """Run and print one table per benchmark."""
    from open_unitok.eval.core.model import Model

    names = detect_benchmarks(args.data) if args.names == ["all"] else args.names
    scoring = scoring_of(args)
    for name in names:
        find_benchmark(name)
        resolve_scorer(name, scoring)
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}; it must be at least 1.")
    with together(args.device) as device:
        elsewhere = holds_external_images(args.model)
        settings = settings_of(args, None if elsewhere else args.model)
        if settings.grid and not elsewhere:
            raise UserError("--grid is for drawings from elsewhere, but --model is a model.")
        model = (
            ExternalImages(Path(args.model), device, settings.grid)
            if elsewhere
            else Model(args.model, settings, device)
        )
        for name in names:
            model.needs(BENCHMARKS[name].needs, name)
        for name in names:
            out = Path(args.out) / name
            result = run_benchmark(name, model, args.data, out, settings, args.batch_size, scoring)
            if result:
                print(table(result))


def settings_of(args: argparse.Namespace, model: str | None) -> Settings:
    """What is asked for, over what the model's folder says that it draws best with."""
    from open_unitok.generation import Sampling

    given = {field.name: getattr(args, field.name) for field in fields(Settings)}
    if model is not None:
        own = asdict(Sampling.from_folder(model_path(model)))
        given |= {name: own[name] for name in SAMPLING_KEYS if given[name] is None}
    return Settings(**{name: value for name, value in given.items() if value is not None})


@contextlib.contextmanager
def together(device: str) -> Iterator[str]:
    """Join the other processes of a torchrun launch, if there are any; yields this process's device.

    Answers may take hours and ranks differ in speed, so that waiting has no limit worth the name.
    """
    if distributed.world_size() == 1:
        yield device
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=datetime.timedelta(days=14))
    yield f"cuda:{distributed.local_rank()}" if device == "cuda" else device
    distributed.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads abort now and then while the interpreter shuts down


def table(result: Record) -> str:
    """A result as lines of text: value, 95 % interval, n."""
    title = f"{result['benchmark']}  ({result['n']} samples, {result['missing']} missing)"
    lines = [title, "-" * len(title)]
    if result["value"] is None:
        lines.append("  no public answers: upload the submission file")
    width = max(map(len, result["metrics"]), default=0)
    for name, metric in result["metrics"].items():
        interval = metric["interval"]
        around = f"[{number(interval[0], metric)}, {number(interval[1], metric)}]" if interval else ""
        lines.append(
            f"  {name:<{width}}  {number(metric['value'], metric):>9}  {around:<20}  n={metric['n']}"
        )
    if not result["comparable"]:
        lines.append(f"  ! not comparable with published numbers: {result['not_comparable_reason']}")
    lines += [f"  ! {problem}" for problem in result["problems"]]
    lines += [f"  > submission/{name}" for name in result.get("submission", ())]
    return "\n".join(lines)


def number(value: float, metric: Record) -> str:
    """A value in its unit."""
    if metric["unit"] == "share":
        return f"{100 * value:.1f} %"
    if metric["unit"] == "points":
        return f"{value:.1f}"
    return f"{value:.2f} dB" if metric["unit"] == "dB" else f"{value:.3f}"
