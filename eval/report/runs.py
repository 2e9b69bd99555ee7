"""The page of `unitok eval report`: metrics next to published ones, bars per category, samples."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from open_unitok.core.text_files import read_json_lines

from ..core.benchmark import Record
from ..core.parquet import parquet_image
from . import page
from .compare import read_result, result_folders
from .page import escape, format_interval, format_value, grid, inline_image, section
from .published import PAPER, PUBLISHED_SCORES, PUBLISHED_UNITS
from .tables import arrange_metrics

MAX_BARS = 30  # groups of one measure
OPEN_RUNS = 3  # more runs than this are closed at first
_LOWER_IS_BETTER = ("fid",)  # units
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
        runs.append(Run(name, {b: read_result(f) for b, f in folders.items()}, folders))
    return runs


def runs_page(runs: Sequence[Run], title: str, seed: int = 0) -> str:
    """The whole page; `seed` selects the random samples."""
    # in order of first occurrence
    benchmarks = list(dict.fromkeys(name for run in runs for name in run.results))
    sections = [main_metrics(runs, benchmarks), published_numbers(runs, benchmarks)]
    for name in benchmarks:
        sections.append(
            section(name, "", benchmark_body([run for run in runs if name in run.results], name, seed))
        )
    models = [
        f"{escape(run.name)}: {page.model_and_versions(next(iter(run.results.values())))}" for run in runs
    ]
    return page.render_page(title, "", sections, "<br>".join(models))


def main_metrics(runs: Sequence[Run], benchmarks: Sequence[str]) -> str:
    """The table of main metrics: every run, and UniTok's paper."""
    rows = []
    for benchmark, metric in _compared_metrics(runs, benchmarks):
        paper = _published(benchmark, metric).get(PAPER)
        rows.append([
            f"{escape(benchmark)} <small>{escape(metric)}</small>",
            *(_metric_cell(run.results.get(benchmark, {}), metric) for run in runs),
            "–" if paper is None else format_value(paper, _unit(benchmark, metric)),
        ])  # fmt: skip
    columns = ("benchmark", *(run.name for run in runs), PAPER)
    note = (
        "95 % bootstrap intervals below the values. ✗: not comparable with published numbers; the reason "
        "is given in the benchmark's section."
    )
    return section("Main metrics", note, page.html_table(columns, rows, range(1, len(runs) + 2)))


def published_numbers(runs: Sequence[Run], benchmarks: Sequence[str]) -> str:
    """The best run and published models: a row per model, as in papers, a column per metric."""
    compared = [pair for pair in _compared_metrics(runs, benchmarks) if _published(*pair)]
    models = {model: None for pair in compared for model in _published(*pair)}
    rows = [[f"<b>{'this report' if len(runs) == 1 else 'best of this report'}</b>"]]
    rows[0] += [f'<b class="best">{_best_value(runs, *pair)}</b>' for pair in compared]
    for model in sorted(models, key=lambda model: model != PAPER):  # the paper first
        values = [(_published(*pair).get(model), _unit(*pair)) for pair in compared]
        rows.append([escape(model), *("–" if v is None else format_value(v, unit) for v, unit in values)])
    columns = ("model", *(f"{benchmark} {_label(metric)}" for benchmark, metric in compared))
    note = "As reported in papers; splits, prompts and image sizes differ, see eval/README.md."
    table = page.html_table(columns, rows, range(1, len(columns))) if compared else ""
    return section("Published numbers", note, table)


def _best_value(runs: Sequence[Run], benchmark: str, metric: str) -> str:
    """The best value of the comparable runs; without any, the best of the others, marked."""
    results = [run.results[benchmark] for run in runs if benchmark in run.results]
    results = [result for result in results if metric in result["metrics"]]
    comparable = [result for result in results if result.get("comparable", True)]
    values, unit = [r["metrics"][metric]["value"] for r in comparable or results], _unit(benchmark, metric)
    best = (min if unit in _LOWER_IS_BETTER else max)(values, default=None)
    return "–" if best is None else format_value(best, unit) + " ✗" * (not comparable)


def _compared_metrics(runs: Sequence[Run], benchmarks: Sequence[str]) -> list[tuple[str, str]]:
    """(benchmark, metric): the main metric, then all others with a published value."""
    pairs = []
    for benchmark in benchmarks:
        metrics = [next(run.results[benchmark]["metric"] for run in runs if benchmark in run.results)]
        metrics += [name for name in PUBLISHED_SCORES.get(benchmark, {}) if name not in metrics]
        pairs += [(benchmark, metric) for metric in metrics if metric is not None]
    return pairs


def _published(benchmark: str, metric: str) -> dict[str, float]:
    """Model -> published value."""
    return PUBLISHED_SCORES.get(benchmark, {}).get(metric, {})


def _unit(benchmark: str, metric: str) -> str:
    return PUBLISHED_UNITS.get((benchmark, metric), "fraction")


def _metric_cell(result: Record, metric: str) -> str:
    """The cell of a metric: value, and interval below it."""
    found = result.get("metrics", {}).get(metric)
    if not found:
        return "–"
    interval = format_interval(found["interval"], found["unit"])
    mark = "" if result.get("comparable", True) else " ✗"
    small = f"<br><small>{interval}</small>" if interval else ""
    return f"<b>{format_value(found['value'], found['unit'])}</b>{mark}{small}"


def result_note(result: Record) -> str:
    """Counts, split, prompt template, scorer and decoding of a result."""
    names = ("n", "missing", "failed", "split", "prompt_template", "scorer", "decoding")
    facts = {name: result.get(name) for name in names}
    return ", ".join(
        f"{name.replace('_', ' ')} {escape(value)}" for name, value in facts.items() if value is not None
    )


def _problems(result: Record) -> str:
    """A box for each problem of a result."""
    problems = list(result["problems"])
    if not result.get("comparable", True):
        problems.insert(0, f"not comparable with published numbers: {result['not_comparable_reason']}")
    return page.warnings(problems)


def benchmark_body(runs: Sequence[Run], benchmark: str, seed: int) -> str:
    """A table of all runs and measures, then each run: problems, measures by group, bars and samples."""
    table = _measures_of_runs(runs, benchmark)
    if len(runs) == 1:
        note = result_note(runs[0].results[benchmark])
        return f"<p>{note}</p>{table}{_run_body(runs[0], benchmark, seed)}"
    blocks = [table]
    for run in runs:
        result = run.results[benchmark]
        # many runs are closed at first: the page stays readable
        title = f"<b>{escape(run.name)}</b> {result_note(result)}"
        blocks.append(page.collapsible(title, _run_body(run, benchmark, seed), len(runs) <= OPEN_RUNS))
    return "".join(blocks)


def _measures_of_runs(runs: Sequence[Run], benchmark: str) -> str:
    """A row per run, a column per measure that has no groups; "" if there is only the main metric."""
    results = [run.results[benchmark] for run in runs]
    names = list(dict.fromkeys(name for r in results for name in arrange_metrics(r["metrics"]).single))
    if len(names) < 2:
        return ""
    rows = [[escape(run.name), *(_metric_cell(r, name) for name in names)] for run, r in zip(runs, results)]
    return page.html_table(
        ("run", *(name.replace("_", " ") for name in names)), rows, range(1, len(names) + 1)
    )


def _run_body(run: Run, benchmark: str, seed: int) -> str:
    """Problems, tables and bars of groups, and galleries of samples."""
    result, folder = run.results[benchmark], run.folders[benchmark]
    arranged = arrange_metrics(result["metrics"])
    tables = [
        page.html_table(
            ("", *table.measures, "n"),
            [
                [escape(_label(g)),
                 *(_group_value(table.cells[m, g]) for m in table.measures),
                 str(table.cells[table.measures[0], g]["n"])]
                for g in table.groups
            ],
            range(1, len(table.measures) + 2),
        )
        for table in arranged.tables
    ]  # fmt: skip
    most = MME_POINTS if benchmark == "mme" else 100.0
    panels = [
        page.panel(_label(measure), [_group_bar(g, m, most) for g, m in list(groups.items())[:MAX_BARS]])
        for measure, groups in arranged.lists.items()
    ]
    path = folder / "scores.jsonl"
    rows = [row for row in read_json_lines(path) if row.get("score") is not None] if path.exists() else []
    worst, chosen = worst_and_random(rows, GALLERY_SIZE, seed)
    return (
        _problems(result)
        + "".join(tables)
        + grid([p for p in panels if p], "columns")
        + grid([_sample_card(row, folder) for row in worst], "samples", "Lowest scores")
        + grid([_sample_card(row, folder) for row in chosen], "samples", "Random samples")
    )


def _label(name: str) -> str:
    return name.replace("_", " ")


def _group_value(metric: Record) -> str:
    """The cell of one group: value, and interval below it."""
    interval = format_interval(metric["interval"], metric["unit"])
    small = f"<br><small>{interval}</small>" if interval else ""
    return f"{format_value(metric['value'], metric['unit'])}{small}"


def _group_bar(group: str, metric: Record, most_points: float) -> str:
    """The bar of a group, relative to 100 % or to the most points."""
    whole = {"fraction": 1.0, "points": most_points}.get(metric["unit"])
    # FID or dB have no maximum, so no bar
    if whole is None:
        return ""
    points = metric["unit"] == "points"
    note = f"of {most_points:.0f} points" if points else ""
    return page.metric_bar(
        _label(group), metric, note, whole, shown=f"{metric['value']:.1f}" if points else ""
    )


def worst_and_random(rows: list[Record], count: int, seed: int) -> tuple[list[Record], list[Record]]:
    """The samples with the lowest scores, and random ones."""
    shuffled = rows[:]
    # shuffle first: the stable sort then breaks ties at random
    random.Random(seed).shuffle(shuffled)
    return sorted(shuffled, key=lambda row: row["score"])[:count], shuffled[-count:]


def _sample_card(row: Record, folder: Path) -> str:
    """One sample: image, question or prompt, answer, truth, score."""
    file = row.get("image") or row.get("file") or row.get("reconstruction") or ""
    path = parquet_image(file) or Path(file)
    if (
        isinstance(path, Path) and not path.is_absolute()
    ):  # relative to the folder of the run, or to the working directory
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
