"""The HTML page of studies: plots, tables, claims, reconstructions side by side, loss curves."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from open_unitok.eval.report import charts, page

from .claims import OPPOSITE, SEEN, format_limit, format_numbers, study_findings
from .columns import Column, Table, known_columns, study_tables
from .config import Study
from .page_style import SCRIPT, STUDY_STYLE
from .plots import Point, lines_svg, scatter_svg
from .table import (
    NOT_RUN,
    Cell,
    Results,
    format_cell,
    make_cells,
    processors,
    read_results,
    reasons_of,
    value_of,
)

Place = tuple[str | None, str]  # a split, or None for the model itself, and a column
# colours of points: where a row's config lies
_GROUPS = {
    "unitok": "UniTok and its parts",
    "quantizers": "quantisers",
    "encoders": "encoders and kinds of tokens",
}


def study_page(studies: Sequence[Study]) -> str:
    """A self-contained page of the finished rows of one or more studies."""
    found = [read_results(study) for study in studies]
    sections = [part for study, results in zip(studies, found) for part in _sections(study, results)]
    rows = sum(len(study.rows) for study in studies)
    runs = sum(len(r) for results in found for r in results.values())
    planned = sum(len(study.rows) * len(study.seeds) for study in studies)
    tiles = [
        _tile(rows, "rows", "one YAML each"),
        _tile(f"{runs}<small> / {planned}</small>", "runs", "a row with a seed"),
        _tile(sum(len(study.claims) for study in studies), "claims", "of the paper and its neighbours"),
    ]
    machines = sorted({name for results in found for name in processors(results)})
    intro = (
        "<p>Every tokenizer on the same images, with the same budget, measured by the same code. Bold values "
        "differ from the first row by a paired bootstrap over images (95 %); shades go from the worst to the "
        "best of a column; a click on a heading sorts.</p>"
    )
    return page.render_page(
        "One table of visual tokenizers",
        f"<style>{STUDY_STYLE}</style>{intro}{page.grid(tiles, 'tiles')}",
        sections,
        f"Measured on {page.escape('; '.join(machines) or 'no machine yet')}.{SCRIPT}",
    )


def _tile(value: object, name: str, note: str) -> str:
    return f'<div class="tile card"><b>{value}</b><span>{name}</span><em>{note}</em></div>'


def _sections(study: Study, results: Results) -> list[str]:
    cells = {table: make_cells(study, table, results) for table in study_tables(study)}
    plots = _downstream_plots(study, results) if study.downstream else _tokenizer_plots(study, results)
    tables = [page.section(t.title.replace("`", ""), _note(t), _table(study, t, cells[t])) for t in cells]
    split = study.splits[0]
    what = "Images of eight classes, without guidance" if study.downstream else f"The first images of {split}"
    return [
        *plots,
        page.section("Side by side", f"{what}, seed {study.seeds[0]}.", _strips(study)),
        *tables,
        page.section("Why a cell has no value", "", _reasons(study, results)),
        page.section("Claims", "What the paper and its neighbours claim, in this study.", _claims(study)),
        page.section(
            "Loss curves", f"Of seed {study.seeds[0]}.", page.grid(_curves(study, results), "charts")
        ),
    ]


def _note(table: Table) -> str:
    keys = {column.key for column in table.columns}
    if "frechet" in keys:
        return (
            "Nearest: whether the nearest original of a reconstruction, by pixels, is the same emoji, also "
            "in its style. FD: Fréchet distance in pooled features of EfficientNet-Lite0, which is not FID. "
            "Codebook overlap: mean squared canonical correlation of the sub-codebooks' entries."
        )
    if "classes_none" in keys:
        return (
            "Images that show exactly the object of their class, by the scenes' detector; its ceiling is "
            "that of reconstructions of real scenes. The best scale is chosen on images of other random "
            "numbers."
        )
    if "probe_latents" in keys:
        return "Questions about scenes that a frozen tokenizer's features let one language model answer."
    return ""


# ---- plots -------------------------------------------------------------------------------------------------


def _mean(results: Results, row: str, split: str | None, key: str) -> float | None:
    values = [v for r in results[row] if (v := value_of(r, split, key)) is not None]
    return sum(values) / len(values) if values else None


def _tokenizer_plots(study: Study, results: Results) -> list[str]:
    split = study.splits[0]
    quality = _scatter(study, results, (None, "bits"), (split, "psnr"), log=True)
    both = _scatter(study, results, (split, "psnr"), (split, "probe_category"))
    legend = "".join(f'<i class="key g{i}"></i>{name}' for i, name in enumerate(_GROUPS.values()))
    return [
        page.section("Quality against bits", f"On {split}. {legend}", quality),
        page.section(
            "Reconstruction against understanding",
            "Up: a linear probe of nine categories on the quantised latents; right: reconstruction.",
            both,
        ),
    ]


def _scatter(study: Study, results: Results, x: Place, y: Place, log: bool = False) -> str:
    axes, points = [known_columns(study)[key] for _, key in (x, y)], []
    for name, row in study.rows.items():
        at = [_mean(results, name, *place) for place in (x, y)]
        if at[0] is not None and at[1] is not None:
            folder = Path(row.config or "").parent.name
            group = list(_GROUPS).index(folder) if folder in _GROUPS else 0
            across, up = at[0] * axes[0].scale, at[1] * axes[1].scale
            points.append(Point(name, across, up, group, f"{row.title}: {across:.4g}, {up:.4g}"))
    svg = scatter_svg(points, axes[0].title, axes[1].title, log) if points else ""
    return f'<figure class="chart">{svg}</figure>' if svg else ""


def _downstream_plots(study: Study, results: Results) -> list[str]:
    lines, bars = [], []
    for name, row in study.rows.items():
        for result in results[name][:1]:
            if result.get("guided"):
                lines.append((row.title, [(x, 100 * y) for x, y in result["guided"]]))
            values = result["splits"][study.splits[0]]
            probe = [values.get(f"probe_{source}") for source in ("latents", "quantised")]
            if None not in probe:
                bars += [charts.bar_row(row.title, probe[1], "", mark=probe[0], mark_name="latents")]
    guided = lines_svg(lines, "guidance scale (1: none)", "right, %") if lines else ""
    return [
        page.section(
            "Class-conditional images over guidance",
            "Images that show exactly the object of their class.",
            f'<figure class="chart">{guided}</figure>' if guided else "",
        ),
        page.section(
            "What discretisation costs",
            "Right answers of the LLaVA probe from quantised features; the mark is the same from latents.",
            page.panel("", bars),
        ),
    ]


# ---- tables ------------------------------------------------------------------------------------------------


def _table(study: Study, table: Table, cells: dict[str, list[Cell]]) -> str:
    head = "".join(f'<th class="n"><span>{page.escape(column.title)}</span></th>' for column in table.columns)
    ranges = [_range(column, [row[i] for row in cells.values()]) for i, column in enumerate(table.columns)]
    lines = []
    for name, row in cells.items():
        shown = "".join(_cell(c, column, r) for c, column, r in zip(row, table.columns, ranges))
        first = f"{page.escape(study.rows[name].title)}<br><small>{page.escape(name)}</small>"
        lines.append(f"<tr><td>{first}</td>{shown}</tr>")
    body = f"<thead><tr><th>row</th>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="card scroll"><table class="sortable">{body}</table></div>'


def _range(column: Column, cells: Sequence[Cell]) -> tuple[float, float] | None:
    """(worst, best) of a column, or None where neither is."""
    values = [cell.value for cell in cells if cell.value is not None]
    if not column.better or len(values) < 2 or min(values) == max(values):
        return None
    return (min(values), max(values)) if column.better == "more" else (max(values), min(values))


def _cell(cell: Cell, column: Column, extremes: tuple[float, float] | None) -> str:
    if cell.value is None:
        kind, _, why = cell.reason.partition(":")
        return f'<td class="n none" title="{page.escape(why.strip() or kind)}">{page.escape(kind)}</td>'
    text = page.escape(format_cell(cell, column, bold=False))
    shade = ""
    if extremes:
        share = (cell.value - extremes[0]) / (extremes[1] - extremes[0])
        shade = f' style="--heat:{24 * share:.0f}%"'
    text = f"<b>{text}</b>" if cell.significant else text
    return f'<td class="n heat" data-value="{cell.value:.6g}"{shade}>{text}</td>'


def _reasons(study: Study, results: Results) -> str:
    lines = [
        f"<li>{page.escape(reason)}: {', '.join(f'<code>{page.escape(n)}</code>' for n in names)}</li>"
        for reason, names in reasons_of(study, results)
    ]
    return f'<ul class="card reasons">{"".join(lines)}</ul>' if lines else ""


def _claims(study: Study) -> str:
    kinds = {SEEN: "yes", OPPOSITE: "no"}
    rows, shown = [], None
    for claim, difference, findings in study_findings(study):
        text = f"<b>{page.escape(claim.source)}</b> {page.escape(claim.text)}" if claim is not shown else ""
        shown = claim
        cells = []
        for finding in findings:
            kind, verdict = kinds.get(finding.verdict, "open"), finding.verdict
            numbers = format_numbers(finding)
            if finding.value is None:
                numbers, verdict = page.escape(finding.verdict), NOT_RUN
            cells.append(f'<i class="chip {kind}">{verdict}</i><br><small>{numbers}</small>')
        limit = " " + page.escape(format_limit(claim, findings[0].column))
        rows.append(
            [f'<div class="wide">{text}</div>', f"<code>{page.escape(difference)}{limit}</code>", *cells]
        )
    return page.html_table(["claim", "measured", *study.splits], rows)


# ---- images and curves -------------------------------------------------------------------------------------


def _strips(study: Study) -> str:
    """The strip of each row beside its title; the originals stay in sight."""
    folder, lines = Path(study.results), []
    originals = folder / "originals.webp"
    if originals.exists():
        lines.append(
            f'<div class="strip first"><span>originals</span>{_inline(originals, "originals")}</div>'
        )
    for name, row in study.rows.items():
        path = folder / name / f"{study.seeds[0]}.webp"
        if path.exists():
            title = f"<span>{page.escape(row.title)}</span>"
            lines.append(f'<div class="strip">{title}{_inline(path, row.title)}</div>')
    return f'<div class="card strips">{"".join(lines)}</div>' if lines else ""


def _inline(path: Path, alt: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{page.escape(alt)}" src="data:image/webp;base64,{data}">'


def _curves(study: Study, results: Results) -> list[str]:
    figures: list[str] = []
    for name, row in study.rows.items():
        curve: list[Any] = results[name][0].get("curve", []) if results[name] else []
        figures += [charts.line_chart(row.title, [(x, y) for x, y in curve])] if curve else []
    return figures
