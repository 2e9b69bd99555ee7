"""Results of `unitok demo`, read from the files of its phases; no metric is computed here."""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from open_unitok.core.errors import UserError
from open_unitok.core.text_files import read_json, read_json_lines

from ..core.benchmark import Record
from .page import format_interval, format_value, percent

STAGES = ("tokenizer", "pretrain", "finetune")
SINGLE_OBJECTS = "single objects: colour, shape and number"
HELD_OUT = "held-out pairs"


@dataclass
class DemoRun:
    """The files of a demo folder."""

    folder: Path
    results: dict[str, Record] = field(default_factory=dict)  # benchmark -> results.json
    samples: dict[str, list[Record]] = field(default_factory=dict)  # benchmark -> scores.jsonl
    curves: dict[str, list[Record]] = field(default_factory=dict)  # stage -> metrics.jsonl
    phases: list[Record] = field(default_factory=list)  # {"name", "seconds", "peak_memory" in bytes}

    def metric(self, benchmark: str, name: str) -> Record | None:
        """One metric of one benchmark, or None."""
        return self.results.get(benchmark, {}).get("metrics", {}).get(name)

    def details(self, benchmark: str) -> Record:
        """The details of a result, or {}."""
        return self.results.get(benchmark, {}).get("details", {})


@dataclass(frozen=True)
class Headline:
    """A row of the headline table."""

    name: str  # two leading blanks: a part of the row above
    value: float
    unit: str  # "fraction", "dB", ...
    interval: list[float] | None = None
    n: int | None = None
    baseline: str = ""  # in words, e.g. "chance 1.3 %"
    tile: str = ""  # short name; rows that have one are also shown as tiles


def read_demo_run(folder: Path, phases: list[Record] | None = None) -> DemoRun:
    """Read `eval/*/results.json`, `<stage>/metrics.jsonl` and `phases.json` of a demo folder.

    Raises:
        UserError: there are no results.
    """
    run = DemoRun(folder)
    for path in sorted((folder / "eval").glob("*/results.json")):
        result = read_json(path)
        run.results[result["benchmark"]] = result
        run.samples[result["benchmark"]] = read_json_lines(path.with_name("scores.jsonl"))
    if not run.results:
        raise UserError(
            f"{folder / 'eval'} holds no results; run `unitok eval run ... --out {folder / 'eval'}` first."
        )
    for stage in STAGES:
        path = folder / stage / "metrics.jsonl"
        if path.exists():
            run.curves[stage] = read_json_lines(path)
    if phases is None and (folder / "phases.json").exists():
        phases = read_json(folder / "phases.json")
    run.phases = list(phases or ())
    return run


def metrics_summary(run: DemoRun) -> Record:
    """The content of `metrics.json`; identical runs differ only in "phases" (times, memory)."""
    return {
        "metrics": {
            name: {metric: row["value"] for metric, row in result["metrics"].items()}
            for name, result in run.results.items()
        },
        "intervals": {
            name: {m: row["interval"] for m, row in result["metrics"].items() if row["interval"]}
            for name, result in run.results.items()
        },
        "details": {
            # the class names of zeroshot are long and constant
            name: {k: v for k, v in result["details"].items() if k != "classes"}
            for name, result in run.results.items()
        },
        "problems": {name: r["problems"] for name, r in run.results.items() if r["problems"]},
        "phases": run.phases,
    }


# -------------------------------------------------------------------------------------------------- headlines


def headlines(run: DemoRun) -> list[Headline]:
    """The rows of the headline table: tokenizer, understanding, generation."""
    return [*_tokenizer_headlines(run), *_understanding_headlines(run), *_generation_headlines(run)]


def _headline(
    run: DemoRun, benchmark: str, metric: str, name: str, baseline: str = "", tile: str = ""
) -> list[Headline]:
    """A list of one row, or of none if the run lacks the metric."""
    row = run.metric(benchmark, metric)
    return (
        [Headline(name, row["value"], row["unit"], row["interval"], row["n"], baseline, tile)] if row else []
    )


def entries_text(details: Record) -> str:
    """The entries of the sub-codebooks, from the details of a reconstruction: "64", or "5, 5, 9"."""
    return ", ".join(map(str, details.get("code_sizes", [details.get("codebook_size")])))


def _tokenizer_headlines(run: DemoRun) -> list[Headline]:
    chance = f"chance {percent(run.details('zeroshot').get('chance', 0))}"
    entries = f"of {entries_text(run.details('reconstruction'))} entries"
    return [
        *_headline(run, "reconstruction", "psnr", "Reconstruction, PSNR", tile="reconstruction PSNR"),
        *_headline(run, "reconstruction", "ssim", "Reconstruction, SSIM"),
        *_headline(run, "reconstruction", "codebook_usage_min", "Codebook usage, lowest sub-codebook"),
        *_headline(run, "reconstruction", "codebook_perplexity_mean", "Codebook perplexity, mean", entries),
        *_headline(run, "zeroshot", "top1", "Zero-shot top-1", chance, "zero-shot top-1"),
        *_headline(run, "zeroshot", f"top1/{HELD_OUT}", "  held-out pairs", chance),
        *_headline(run, "retrieval", "image_to_text/R@1", "Image-to-text R@1 among 100", "chance 1 %"),
    ]


def _understanding_headlines(run: DemoRun) -> list[Headline]:
    vqa = run.details("vqav2")
    constant = f"best constant answers {percent(vqa.get('constant_overall', 0))}"
    rows = _headline(run, "vqav2", "accuracy", "Question answering", constant, "question answering")
    for kind, best in vqa.get("constant", {}).items():
        baseline = f"always “{best['answer']}” {percent(best['accuracy'])}"
        rows += _headline(run, "vqav2", f"type/{kind}", f"  {kind}", baseline)
    rows += _headline(run, "vqav2", "images with held-out pairs", "  images with held-out pairs")
    return rows + _headline(run, "pope", "f1", "POPE, mean F1 of its three categories", tile="POPE F1")


def _generation_headlines(run: DemoRun) -> list[Headline]:
    rows = _headline(
        run, "geneval", SINGLE_OBJECTS, "Single objects: colour, shape and number", tile="single objects"
    )
    rows += _headline(
        run, "positions", "position", "Single objects: also the position", tile="at the position"
    )
    rows += _headline(run, "positions", HELD_OUT, "  held-out pairs")
    details = run.details("geneval")
    ceiling = _ceiling(details.get("ceiling_overall"))
    rows += _headline(run, "geneval", "overall", "GenEval-style, mean of tags", ceiling, "GenEval-style")
    for tag, value in details.get("ceiling", {}).items():
        rows += _headline(run, "geneval", f"tag/{tag}", f"  {tag.replace('_', ' ')}", _ceiling(value))
    return rows + _headline(run, "geneval", HELD_OUT, "  held-out pairs")


def _ceiling(value: float | None) -> str:
    """The ceiling (score of reconstructed real images) as a baseline text."""
    return "" if value is None else f"ceiling {percent(value)}"


def held_out_note(run: DemoRun) -> str:
    """Which numbers include colour-shape pairs that are absent from training; "" without such pairs."""
    if not any(HELD_OUT in metric for r in run.results.values() for metric in r["metrics"]):
        return ""
    return (
        "Held-out pairs are combinations of colour and shape that never occur in training. Reconstruction, "
        "codebooks, question answering and POPE are measured on all test images, including those with "
        "held-out pairs; zero-shot and generation exclude held-out pairs and report them in separate rows."
    )


def text_table(folder: str | Path) -> str:
    """The headline table as text, for a terminal."""
    rows = headlines(read_demo_run(Path(folder)))
    width = max(len(row.name) for row in rows)
    return "\n".join(
        f"{row.name:<{width}}  {format_value(row.value, row.unit):>9}  "
        f"{format_interval(row.interval, row.unit):<16}  {row.baseline}".rstrip()
        for row in rows
    )


# ----------------------------------------------------------------------------------------- samples and curves


def choose_samples(rows: list[Record], count: int, group: str = "", seed: int = 0) -> list[Record]:
    """`count` random rows, round-robin over the groups of `row[group]`; nothing is hand-picked."""
    rng = random.Random(seed)
    groups: dict[Any, list[Record]] = {}
    for row in rows:
        groups.setdefault(row.get(group), []).append(row)
    for members in groups.values():
        rng.shuffle(members)
    chosen: list[Record] = []
    while len(chosen) < count and any(groups.values()):
        for members in groups.values():
            if members and len(chosen) < count:
                chosen.append(members.pop())
    return chosen


# Order of the curves of a metrics.jsonl: these names, then metrics that are logged per part
# ("text_loss/captioning", "perplexity/0", ...), then all other numbers.
FIRST_CURVES = ("loss", "l2", "l1", "lpips", "vq", "clip", "adversarial", "text_loss", "image_loss")
PER_PART_CURVES = ("text_loss", "accuracy", "perplexity", "usage")
NOT_CURVES = ("step", "seconds", "samples_per_second", "epoch")


def stage_curves(rows: list[Record], limit: int = 6) -> dict[str, list[tuple[float, float]]]:
    """Name -> (step, value) points of at most `limit` curves of a stage."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in NOT_CURVES and isinstance(value, int | float) and not isinstance(value, bool):
                curves.setdefault(name, []).append((row["step"], float(value)))
    curves = {name: points for name, points in curves.items() if len(points) > 1}  # a point is no curve

    def rank(name: str) -> tuple[int, str]:
        if name in FIRST_CURVES:
            return FIRST_CURVES.index(name), name
        whole, slash, _ = name.partition("/")
        per_part = slash and whole in PER_PART_CURVES
        return len(FIRST_CURVES) + (PER_PART_CURVES.index(whole) if per_part else len(PER_PART_CURVES)), name

    names = sorted(curves, key=rank)[:limit]
    # three curves per row: drop an incomplete last row
    return {name: curves[name] for name in (names if len(names) < 3 else names[: len(names) // 3 * 3])}
