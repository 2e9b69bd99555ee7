"""The report of a whole run: `report.html`, `report.png` and `metrics.json` from what its phases left.

Reads results and curves, computes nothing: every number stands in a `results.json` or a `metrics.jsonl`.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from open_unitok.core.errors import UserError
from open_unitok.core.files import read_json, read_jsonl, write_atomic, write_json

from ..core.harness import Row

STAGES = ("tokenizer", "pretrain", "finetune")
APART = "images with held-out pairs"


@dataclass
class Material:
    """What a report is made of."""

    run: Path
    results: dict[str, Row] = field(default_factory=dict)  # benchmark -> results.json
    samples: dict[str, list[Row]] = field(default_factory=dict)  # benchmark -> scores.jsonl
    curves: dict[str, list[Row]] = field(default_factory=dict)  # stage -> metrics.jsonl
    phases: list[Row] = field(default_factory=list)  # {"name", "seconds", "peak_memory" in bytes}

    def value(self, benchmark: str, metric: str) -> Row | None:
        """One metric of one benchmark, None where there is none."""
        return self.results.get(benchmark, {}).get("metrics", {}).get(metric)


@dataclass(frozen=True)
class Line:
    """One line of the headline table; `beside` is what the value has to be compared with."""

    name: str
    value: float
    unit: str  # "share", "dB", ...
    interval: list[float] | None = None
    n: int | None = None
    beside: str = ""
    tile: str = ""  # a shorter name; lines that have one are shown large


def write_report(run: str | Path, phases: list[Row] | None = None, title: str = "UniTok in a box") -> Row:
    """Write the three files into `run` and return what `metrics.json` holds.

    Args:
        run: a folder with `eval/<benchmark>/results.json` and, where they are, `<stage>/metrics.jsonl`.
        phases: {"name", "seconds", "peak_memory"} per phase; None = `run/phases.json` if it is there.

    Raises:
        UserError: there are no results in `run/eval`.
    """
    from .html import page
    from .png import sheet

    material = collect(Path(run), phases)
    lines = headline(material)
    metrics = numbers(material)
    write_json(material.run / "metrics.json", metrics)
    write_atomic(material.run / "report.html", page(material, lines, title))
    write_atomic(material.run / "report.png", sheet(material, lines, title))
    return metrics


def collect(run: Path, phases: list[Row] | None = None) -> Material:
    """Read all that the phases wrote."""
    material = Material(run)
    for path in sorted((run / "eval").glob("*/results.json")):
        result = read_json(path)
        material.results[result["benchmark"]] = result
        material.samples[result["benchmark"]] = read_jsonl(path.with_name("scores.jsonl"))
    if not material.results:
        raise UserError(
            f"{run / 'eval'} holds no results; run `unitok eval run ... --out {run / 'eval'}` first."
        )
    for stage in STAGES:
        path = run / stage / "metrics.jsonl"
        if path.exists():
            material.curves[stage] = read_jsonl(path)
    if phases is None and (run / "phases.json").exists():
        phases = read_json(run / "phases.json")
    material.phases = list(phases or ())
    return material


def numbers(material: Material) -> Row:
    """`metrics.json`: every value by benchmark, the same for the same answers; times and memory apart."""
    return {
        "metrics": {
            name: {metric: row["value"] for metric, row in result["metrics"].items()}
            for name, result in material.results.items()
        },
        "intervals": {
            name: {m: row["interval"] for m, row in result["metrics"].items() if row["interval"]}
            for name, result in material.results.items()
        },
        "details": {
            name: {k: v for k, v in result["details"].items() if k not in ("classes",)}
            for name, result in material.results.items()
        },
        "problems": {name: r["problems"] for name, r in material.results.items() if r["problems"]},
        "phases": material.phases,
    }


def headline(material: Material) -> list[Line]:
    """The table of a run in reading order: the tokenizer, then seeing, then drawing."""
    details = {name: result["details"] for name, result in material.results.items()}
    lines: list[Line] = []

    def add(benchmark: str, metric: str, name: str, beside: str = "", tile: str = "") -> None:
        row = material.value(benchmark, metric)
        if row:
            lines.append(Line(name, row["value"], row["unit"], row["interval"], row["n"], beside, tile))

    add("reconstruction", "psnr", "Reconstruction, PSNR", tile="reconstruction")
    add("reconstruction", "ssim", "Reconstruction, SSIM")
    size = details.get("reconstruction", {}).get("codebook_size")
    add("reconstruction", "codebook_usage_min", "Codebook entries used, worst sub-codebook")
    add("reconstruction", "codebook_perplexity_mean", "Codebook perplexity, mean", f"of {size} entries")
    chance = details.get("zeroshot", {}).get("chance", 0)
    add("zeroshot", "top1", "Zero-shot top-1", f"chance {percent(chance)}", "zero-shot")
    add("zeroshot", "top1/held-out pairs", "Zero-shot top-1, held-out pairs", f"chance {percent(chance)}")
    add("retrieval", "image_to_text/R@1", "Retrieval of its caption among 100", "chance 1 %")
    vqa = details.get("vqav2", {})
    blind = f"best constant {percent(vqa.get('constant_overall', 0))}"
    add("vqav2", "accuracy", "Question answering", blind, "questions")
    for kind, constant in vqa.get("constant", {}).items():
        add(
            "vqav2",
            f"type/{kind}",
            f"  {kind}",
            f"always “{constant['answer']}” {percent(constant['accuracy'])}",
        )
    add("vqav2", APART, "  images with held-out pairs")
    add("pope", "f1", "POPE, F1 (mean of three)", tile="POPE F1")
    add(
        "geneval",
        "single objects: colour, shape and number",
        "Drawn: colour, shape and number",
        tile="drawn right",
    )
    add("drawing_positions", "position", "Drawn: and at the place asked", tile="drawn in place")
    add("drawing_positions", "held-out pairs", "  held-out pairs at the place asked")
    ceiling = details.get("geneval", {}).get("ceiling_overall")
    add("geneval", "overall", "GenEval-style, mean of tags", beside_ceiling(ceiling), "GenEval-style")
    for tag, value in details.get("geneval", {}).get("ceiling", {}).items():
        add("geneval", f"tag/{tag}", f"  {tag.replace('_', ' ')}", beside_ceiling(value))
    add("geneval", "held-out pairs", "  held-out pairs")
    return lines


def beside_ceiling(value: float | None) -> str:
    """What the detector finds on reconstructions of real images."""
    return "" if value is None else f"ceiling {percent(value)}"


def about_held_out(material: Material) -> str:
    """Which numbers include colour x shape pairs that training never showed; "" where nothing is apart."""
    if not any("held-out pairs" in metric for r in material.results.values() for metric in r["metrics"]):
        return ""
    return (
        "Held-out pairs are colour x shape pairs that training never shows. Reconstruction, codebooks, "
        "questions and POPE are measured on all test images, those with held-out pairs included; zero-shot "
        "and drawing leave the held-out pairs out, and have lines of their own for them."
    )


def percent(value: float) -> str:
    """A share in per cent."""
    return f"{100 * value:.1f} %"


def shown(value: float, unit: str) -> str:
    """A value in its unit."""
    if unit == "share":
        return percent(value)
    return f"{value:.2f} dB" if unit == "dB" else f"{value:.3f}" if unit == "ssim" else f"{value:.1f}"


def text_table(run: str | Path) -> str:
    """The headline table as text, for a terminal."""
    lines = headline(collect(Path(run)))
    width = max(len(line.name) for line in lines)
    rows = []
    for line in lines:
        around = ""
        if line.interval:
            low, high = (shown(v, line.unit).split()[0] for v in line.interval)
            around = f"[{low}, {high}]"
        rows.append(
            f"{line.name:<{width}}  {shown(line.value, line.unit):>9}  {around:<16}  {line.beside}".rstrip()
        )
    return "\n".join(rows)


def choose(rows: list[Row], count: int, group: str = "", seed: int = 0) -> list[Row]:
    """`count` rows by lot, in turn from the groups that `row[group]` names: no image is hand-picked."""
    rng = random.Random(seed)
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.get(group), []).append(row)
    for members in groups.values():
        rng.shuffle(members)
    chosen: list[Row] = []
    while len(chosen) < count and any(groups.values()):
        for members in groups.values():
            if members and len(chosen) < count:
                chosen.append(members.pop())
    return chosen


def drawn(material: Material) -> list[Row]:
    """The drawings of GenEval-style prompts by lot, with the path of each image."""
    rows = [r for r in material.samples.get("geneval", []) if r["kind"] == "draw" and r["file"]]
    folder = material.run / "eval" / "geneval"
    return [row | {"path": folder / row["file"]} for row in choose(rows, 35, "group")]


def placed(material: Material) -> list[Row]:
    """Drawings of single objects at a place, by lot."""
    rows = [r for r in material.samples.get("drawing_positions", []) if r["kind"] == "draw" and r["file"]]
    folder = material.run / "eval" / "drawing_positions"
    return [row | {"path": folder / row["file"]} for row in choose(rows, 14, "group")]


def copied(material: Material, count: int = 16) -> list[Row]:
    """Originals and reconstructions by lot, with both paths."""
    folder = material.run / "eval" / "reconstruction"
    rows = choose(material.samples.get("reconstruction", []), count)
    return [row | {"path": Path(row["image"]), "copy_path": folder / row["copy"]} for row in rows]


def asked(material: Material, count: int = 24) -> list[Row]:
    """Questions by lot, the types in turn, with the path of each image."""
    rows = choose(material.samples.get("vqav2", []), count, "group")
    return [row | {"path": Path(row["image"])} for row in rows]


# What to show of a stage's metrics.jsonl, the most telling first: whole names, then what is kept per part
# ("text_loss/captioning", "perplexity/0", ...); anything else numeric follows.
FIRST = ("loss", "l2", "l1", "lpips", "vq", "clip", "adversarial", "text_loss", "image_loss")
PARTS = ("text_loss", "accuracy", "perplexity", "usage")
NEVER = ("step", "seconds", "samples_per_second", "epoch")


def stage_curves(rows: list[Row], most: int = 6) -> dict[str, list[tuple[float, float]]]:
    """Name -> points (step, value) of the most telling curves of a stage."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in NEVER and isinstance(value, int | float) and not isinstance(value, bool):
                curves.setdefault(name, []).append((row["step"], float(value)))
    curves = {name: points for name, points in curves.items() if len(points) > 1}

    def place(name: str) -> tuple[int, str]:
        if name in FIRST:
            return FIRST.index(name), name
        whole, slash, _ = name.partition("/")
        return len(FIRST) + (PARTS.index(whole) if slash and whole in PARTS else len(PARTS)), name

    # the page shows three side by side: full rows only
    names = sorted(curves, key=place)[:most]
    return {name: curves[name] for name in (names if len(names) < 3 else names[: len(names) // 3 * 3])}
