"""Runs beside published numbers, bars, worst and random samples, as one HTML page."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from open_unitok.core.files import read_json, read_jsonl

from ..core.compare import folders_of
from ..core.harness import Row
from . import charts
from .html import picture, section, text
from .published import PAPER, PUBLISHED
from .style import STYLE

WIDEST = 30  # categories shown as bars
SHOWN = 12  # samples of each kind in a gallery


class Run(NamedTuple):
    """A run as it is shown: its name, and per benchmark its result and the folder that holds it."""

    name: str
    results: dict[str, Row]
    folders: dict[str, Path]


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """The results of every run, named by its folder, or by its whole path where names would repeat."""
    names = [Path(path).name or str(path) for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    runs = []
    for name, path in zip(names, paths):
        folders = folders_of(path)
        runs.append(Run(name, {b: read_json(f / "results.json") for b, f in folders.items()}, folders))
    return runs


def page(runs: Sequence[Run], title: str, seed: int = 0) -> str:
    """The whole page; nothing is loaded from elsewhere."""
    benchmarks = list(dict.fromkeys(name for one in runs for name in one.results))
    parts = [numbers(runs, benchmarks)]
    for name in benchmarks:
        for one in runs:
            if name in one.results:
                label = name if len(runs) == 1 else f"{name}: {one.name}"
                parts.append(section(label, about(one.results[name]), details(one, name, seed)))
    parts.append(made_with(runs))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<header><h1>{text(title)}</h1></header>{''.join(parts)}</main></body></html>\n"
    )


def numbers(runs: Sequence[Run], benchmarks: Sequence[str]) -> str:
    """The table: main numbers of every run, the paper's, and the best and the range of the others'."""
    head = "".join(f"<th class='n'>{text(one.name)}</th>" for one in runs)
    rows = []
    for benchmark in benchmarks:
        metrics = [next(r.results[benchmark]["metric"] for r in runs if benchmark in r.results)]
        metrics += [m for m in PUBLISHED.get(benchmark, {}) if m not in metrics]
        for metric in metrics:
            if metric is not None:
                rows.append(number_row(runs, benchmark, metric))
    if not rows:
        return ""
    line = "A cross marks what must not stand beside published numbers; the reason stands with the benchmark."
    header = f"<tr><th>benchmark</th>{head}<th class='n'>{text(PAPER)}</th><th>others</th></tr>"
    body = f'<div class="card scroll"><table>{header}{"".join(rows)}</table></div>'
    return section("Numbers", line, body)


def number_row(runs: Sequence[Run], benchmark: str, metric: str) -> str:
    """One line of the table."""
    cells = []
    for one in runs:
        result = one.results.get(benchmark, {})
        found = result.get("metrics", {}).get(metric)
        if not found:
            cells.append("<td class='n'>–</td>")
            continue
        around = ""
        if found["interval"]:
            low, high = (shown(v, found["unit"]) for v in found["interval"])
            around = f"<br><small>{low} – {high}</small>"
        mark = "" if result.get("comparable", True) else " ✗"
        cells.append(f"<td class='n'><b>{shown(found['value'], found['unit'])}</b>{mark}{around}</td>")
    known = dict(PUBLISHED.get(benchmark, {}).get(metric, {}))
    paper = known.pop(PAPER, None)
    unit = "points" if benchmark == "mme" else "share"
    others = ", ".join(f"{text(name)} {shown(value, unit)}" for name, value in known.items())
    return (
        f"<tr><td>{text(benchmark)} <small>{text(metric)}</small></td>{''.join(cells)}"
        f"<td class='n'>{shown(paper, unit) if paper is not None else '–'}</td>"
        f"<td style='white-space:normal'><small>{others}</small></td></tr>"
    )


def shown(value: float, unit: str) -> str:
    """A value without its unit: shares in per cent."""
    return (
        f"{100 * value:.1f}" if unit == "share" else f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"
    )


def about(result: Row) -> str:
    """How the numbers came about, and what is to be said of them."""
    names = ("n", "missing", "failed", "split", "recipe", "scorer", "decoding")
    facts = {name: result.get(name) for name in names}
    line = ", ".join(f"{name} {text(value)}" for name, value in facts.items() if value is not None)
    problems = list(result["problems"])
    if not result.get("comparable", True):
        problems.insert(0, f"not comparable with published numbers: {result['why not comparable']}")
    return line + "".join(f'<span class="warn card" style="display:block">{text(p)}</span>' for p in problems)


def details(one: Run, benchmark: str, seed: int) -> str:
    """Bars per category and the galleries of a benchmark."""
    result, folder = one.results[benchmark], one.folders[benchmark]
    bars = [bar(name, metric) for name, metric in result["metrics"].items() if "/" in name]
    body = f'<div class="panel card">{"".join(bars[:WIDEST])}</div>' if bars else ""
    path = folder / "scores.jsonl"
    rows = [row for row in read_jsonl(path) if row.get("score") is not None] if path.exists() else []
    worst, drawn = pick(rows, SHOWN, seed)
    for title, chosen in (("Worst", worst), ("By lot", drawn)):
        if chosen:
            cards = "".join(card(row, folder) for row in chosen)
            body += f'<h3>{title}</h3><div class="asks">{cards}</div>'
    return body


def bar(name: str, metric: Row) -> str:
    """A metric of a category as a bar: of 100 %, or of the 200 points that a task of MME is worth."""
    whole = {"share": 1.0, "points": 200.0}.get(metric["unit"])
    if whole is None:
        return ""
    value, interval = metric["value"] / whole, metric["interval"] and [v / whole for v in metric["interval"]]
    note = f"{name}, n = {metric['n']}"
    if metric["unit"] == "points":
        note += f", {metric['value']:.1f} of 200 points"
    return charts.bar_row(name.partition("/")[2], value, note, interval)


def pick(rows: list[Row], count: int, seed: int) -> tuple[list[Row], list[Row]]:
    """The samples with the lowest scores, ties by lot, and some of all by lot."""
    lot = random.Random(seed)
    shuffled = rows[:]
    lot.shuffle(shuffled)
    return sorted(shuffled, key=lambda row: row["score"])[:count], shuffled[-count:]


def card(row: Row, folder: Path) -> str:
    """One sample: image, question or prompt, answer, truth, score."""
    place = row.get("image") or row.get("file") or row.get("copy") or ""
    path = (
        Path(place)
        if Path(place).is_absolute()
        else next((p for p in (folder / place, Path(place)) if p.is_file()), folder / place)
    )
    image = picture(path, "the sample's image") if place else "<span></span>"
    asked = row.get("question") or row.get("prompt") or path.name
    lines = []
    if row.get("answer") is not None:
        lines.append(f"<b>{text(row['answer']) or '(empty)'}</b>")
    if row.get("truth") is not None:
        lines.append(f"<small>truth: {text(row['truth'])}</small>")
    note = row.get("error") or row.get("reason") or row.get("group") or ""
    lines.append(f"<small>score {row['score']:.3g}{' · ' if note else ''}{text(note)}</small>")
    return f'<div class="ask card">{image}<div><q>{text(asked)}</q>{"".join(lines)}</div></div>'


def made_with(runs: Sequence[Run]) -> str:
    """Models and versions."""
    lines = []
    for one in runs:
        result = next(iter(one.results.values()))
        versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        model = result["model"]
        print_ = str(model.get("fingerprint", ""))[:16]
        lines.append(
            f"{text(one.name)}: {text(model.get('path', ''))} <code>{text(print_)}</code>, {text(versions)}"
        )
    return f'<footer class="end">{"<br>".join(lines)}</footer>'
