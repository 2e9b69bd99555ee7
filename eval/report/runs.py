"""The page of `unitok eval report`: metrics next to published ones, bars per category, samples."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from open_unitok.core.text_files import read_json, read_json_lines

from ..core.benchmark import Record
from . import page
from .compare import result_folders
from .page import escape, format_interval, format_value, grid, inline_image, section
from .published import PAPER, PUBLISHED_SCORES

MAX_BARS = 30  # categories of one benchmark
GALLERY_SIZE = 12  # samples of each gallery
MME_POINTS = 200.0  # maximum score of one MME task


class Run(NamedTuple):
    """A run: display name, and per benchmark its results.json and folder."""

    name: str
    results: dict[str, Record]
    folders: dict[str, Path]


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """The results of every run, named by its folder, or by its path if names repeat."""
    # several runs are often called `eval`
    names = [Path(path).name or str(path) for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    runs = []
    for name, path in zip(names, paths):
        folders = result_folders(path)
        runs.append(Run(name, {b: read_json(f / "results.json") for b, f in folders.items()}, folders))
    return runs


def runs_page(runs: Sequence[Run], title: str, seed: int = 0) -> str:
    """The whole page; `seed` selects the random samples."""
    # in order of first occurrence
    benchmarks = list(dict.fromkeys(name for run in runs for name in run.results))
    sections = [main_metrics(runs, benchmarks)]
    for name in benchmarks:
        for run in runs:
            if name in run.results:
                label = name if len(runs) == 1 else f"{name}: {run.name}"
                sections.append(
                    section(label, result_note(run.results[name]), benchmark_body(run, name, seed))
                )
    models = [
        f"{escape(run.name)}: {page.model_and_versions(next(iter(run.results.values())))}" for run in runs
    ]
    return page.render_page(title, "", sections, "<br>".join(models))


def main_metrics(runs: Sequence[Run], benchmarks: Sequence[str]) -> str:
    """The table of main metrics: every run, UniTok's paper and other models."""
    rows = []
    for benchmark in benchmarks:
        metrics = [next(run.results[benchmark]["metric"] for run in runs if benchmark in run.results)]
        # the main metric first, then all others with a published value
        metrics += [name for name in PUBLISHED_SCORES.get(benchmark, {}) if name not in metrics]
        rows += [_metric_row(runs, benchmark, metric) for metric in metrics if metric is not None]
    columns = ("benchmark", *(run.name for run in runs), PAPER, "other models")
    note = (
        "95 % bootstrap intervals below the values. ✗: not comparable with published numbers; the reason "
        "is given in the benchmark's section."
    )
    return section("Main metrics", note, page.html_table(columns, rows, range(1, len(runs) + 2)))


def _metric_row(runs: Sequence[Run], benchmark: str, metric: str) -> list[str]:
    """The table cells of one metric."""
    cells = [f"{escape(benchmark)} <small>{escape(metric)}</small>"]
    for run in runs:
        result = run.results.get(benchmark, {})
        found = result.get("metrics", {}).get(metric)
        if not found:
            cells.append("–")
            continue
        interval = format_interval(found["interval"], found["unit"])
        mark = "" if result.get("comparable", True) else " ✗"
        small = f"<br><small>{interval}</small>" if interval else ""
        cells.append(f"<b>{format_value(found['value'], found['unit'])}</b>{mark}{small}")
    # a copy: the paper's value is popped below
    published = dict(PUBLISHED_SCORES.get(benchmark, {}).get(metric, {}))
    unit = "points" if benchmark == "mme" else "fraction"
    paper = published.pop(PAPER, None)
    cells.append("–" if paper is None else format_value(paper, unit))
    others = ", ".join(f"{escape(name)} {format_value(value, unit)}" for name, value in published.items())
    return [*cells, f'<small class="wrap">{others}</small>']


def result_note(result: Record) -> str:
    """Counts, split, prompt template, scorer and decoding of a result, and its problems."""
    names = ("n", "missing", "failed", "split", "prompt_template", "scorer", "decoding")
    facts = {name: result.get(name) for name in names}
    line = ", ".join(
        f"{name.replace('_', ' ')} {escape(value)}" for name, value in facts.items() if value is not None
    )
    problems = list(result["problems"])
    if not result.get("comparable", True):
        problems.insert(0, f"not comparable with published numbers: {result['not_comparable_reason']}")
    return line + page.warnings(problems)


def benchmark_body(run: Run, benchmark: str, seed: int) -> str:
    """Bars per category and galleries of samples."""
    result, folder = run.results[benchmark], run.folders[benchmark]
    bars = [_category_bar(name, metric) for name, metric in result["metrics"].items() if "/" in name]
    path = folder / "scores.jsonl"
    rows = [row for row in read_json_lines(path) if row.get("score") is not None] if path.exists() else []
    worst, chosen = worst_and_random(rows, GALLERY_SIZE, seed)
    return (
        page.panel("", bars[:MAX_BARS])
        + grid([_sample_card(row, folder) for row in worst], "samples", "Lowest scores")
        + grid([_sample_card(row, folder) for row in chosen], "samples", "Random samples")
    )


def _category_bar(name: str, metric: Record) -> str:
    """The bar of a category: relative to 100 %, or to the maximum of an MME task."""
    whole = {"fraction": 1.0, "points": MME_POINTS}.get(metric["unit"])
    # FID or dB have no maximum, so no bar
    if whole is None:
        return ""
    points = f": {metric['value']:.1f} of {MME_POINTS:.0f} points" if metric["unit"] == "points" else ""
    return page.metric_bar(name.partition("/")[2].replace("_", " "), metric, name + points, whole)


def worst_and_random(rows: list[Record], count: int, seed: int) -> tuple[list[Record], list[Record]]:
    """The samples with the lowest scores, and random ones."""
    shuffled = rows[:]
    # shuffle first: the stable sort then breaks ties at random
    random.Random(seed).shuffle(shuffled)
    return sorted(shuffled, key=lambda row: row["score"])[:count], shuffled[-count:]


def _sample_card(row: Record, folder: Path) -> str:
    """One sample: image, question or prompt, answer, truth, score."""
    file = row.get("image") or row.get("file") or row.get("reconstruction") or ""
    path = Path(file)
    if not path.is_absolute():  # relative to the folder of the run, or to the working directory
        path = next((p for p in (folder / file, Path(file)) if p.is_file()), folder / file)
    lines = []
    if row.get("answer") is not None:
        lines.append(f"<b>{escape(row['answer']) or '(empty)'}</b>")
    if row.get("truth") is not None:
        lines.append(f"<small>truth: {escape(row['truth'])}</small>")
    note = row.get("error") or row.get("reason") or row.get("group") or ""
    lines.append(f"<small>score {row['score']:.3g}{' · ' if note else ''}{escape(note)}</small>")
    image = inline_image(path, "the sample's image") if file else "<span></span>"
    return page.sample_card(image, row.get("question") or row.get("prompt") or path.name, lines)
