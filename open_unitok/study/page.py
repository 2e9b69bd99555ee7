"""The HTML page of a study: tables, reconstructions side by side, loss curves, quality against bits."""

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from open_unitok.core.text_files import read_json_lines
from open_unitok.eval.report import charts, page

from .config import Study
from .table import MODEL_COLUMNS, SPLIT_COLUMNS, format_cell, make_cells

SHOWN_IMAGES = 8
_WIDTH, _HEIGHT, _MARGIN = 720, 380, 48


def study_page(study: Study, title: str) -> str:
    """A self-contained page of the finished rows."""
    split = study.splits[0]
    sections = [
        page.section("Quality against bits", f"PSNR on <code>{split}</code>.", _scatter(study, split)),
        *(_table_section(study, split) for split in (*study.splits, None)),
        page.section(
            "Reconstructions",
            f"The first images of <code>{split}</code>, seed {study.seeds[0]}; originals in the first line.",
            _reconstructions(study, split),
        ),
        page.section("Loss curves", "", page.grid(_curves(study), "charts")),
    ]
    intro = (
        f"<p>{len(study.rows)} tokenizers, the same images, the same budget. Bold values differ from "
        f"<code>{page.escape(study.baseline)}</code> (paired bootstrap over images, 95 %).</p>"
    )
    return page.render_page(title, intro, sections, "")


def _table_section(study: Study, split: str | None) -> str:
    columns = SPLIT_COLUMNS if split else MODEL_COLUMNS
    rows = []
    for name, cells in make_cells(study, split).items():
        first = f"{page.escape(study.rows[name].title)}<br><small>{page.escape(name)}</small>"
        shown = []
        for cell, column in zip(cells, columns):
            text = page.escape(format_cell(cell, column, bold=False))
            shown.append(f"<b>{text}</b>" if cell.significant else text)
        rows.append([first, *shown])
    table = page.html_table(["row", *(column.title for column in columns)], rows, range(1, len(columns) + 1))
    return page.section(f"Results on {split}" if split else "Sizes and times", "", table)


def _scatter(study: Study, split: str) -> str:
    """PSNR over bits per image (log scale), a labelled point per row."""
    model, quality = make_cells(study, None), make_cells(study, split)
    bits = [column.key for column in MODEL_COLUMNS].index("bits")
    psnr = [column.key for column in SPLIT_COLUMNS].index("psnr")
    points = [
        (name, model[name][bits].value, quality[name][psnr].value)
        for name in study.rows
        if model[name][bits].value and quality[name][psnr].value
    ]
    if not points:
        return ""
    return f'<figure class="chart">{scatter_svg(points)}</figure>'


def scatter_svg(points: Sequence[tuple[str, Any, Any]]) -> str:
    """(name, x, y) as labelled points; x on a logarithmic scale."""
    logs = [math.log2(x) for _, x, _ in points]
    ys = [y for _, _, y in points]
    x0, x1 = min(logs) - 0.3, max(logs) + 0.9
    margin = 0.08 * (max(ys) - min(ys)) or 1.0
    y0, y1 = min(ys) - margin, max(ys) + margin
    parts = []
    for power in range(math.ceil(x0), math.floor(x1) + 1):
        at = _MARGIN + (power - x0) / (x1 - x0) * (_WIDTH - 2 * _MARGIN)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="10" y2="{_HEIGHT - 30}"/>')
        parts.append(f'<text x="{at:.1f}" y="{_HEIGHT - 12}" text-anchor="middle">{2**power} bits</text>')
    for value in range(math.ceil(y0), math.floor(y1) + 1):
        at = _HEIGHT - 30 - (value - y0) / (y1 - y0) * (_HEIGHT - 40)
        parts.append(f'<line class="grid" x1="{_MARGIN}" x2="{_WIDTH - 10}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_MARGIN - 6}" y="{at + 3.5:.1f}" text-anchor="end">{value}</text>')
    for (name, _, y), log in zip(points, logs):
        x = _MARGIN + (log - x0) / (x1 - x0) * (_WIDTH - 2 * _MARGIN)
        down = _HEIGHT - 30 - (y - y0) / (y1 - y0) * (_HEIGHT - 40)
        parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{down:.1f}" r="4"/>')
        parts.append(f'<text x="{x + 7:.1f}" y="{down + 3.5:.1f}">{html.escape(name)}</text>')
    box = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="PSNR over bits"'
    return f"<svg {box}>{''.join(parts)}</svg>"


def _reconstructions(study: Study, split: str) -> str:
    """A line of images per row that was run here; runs of other machines have none."""
    rows = []
    for name, row in study.rows.items():
        folder = Path(study.out, f"{name}-{study.seeds[0]}", "eval", split, "reconstruction")
        if not (folder / "scores.jsonl").exists():
            continue
        found = sorted(read_json_lines(folder / "scores.jsonl"), key=lambda r: r["index"])[:SHOWN_IMAGES]
        if not rows:
            rows.append(["originals", *(page.inline_image(Path(r["image"]), "original") for r in found)])
        images = [page.inline_image(folder / r["reconstruction"], row.title) for r in found]
        rows.append([page.escape(row.title), *images])
    return page.html_table(["row", *[""] * SHOWN_IMAGES], rows)


def _curves(study: Study) -> list[str]:
    """The loss of each row that was run here."""
    figures = []
    for name, row in study.rows.items():
        path = Path(study.out, f"{name}-{study.seeds[0]}", "metrics.jsonl")
        if path.exists():
            points = [(r["step"], r["loss"]) for r in read_json_lines(path) if "loss" in r]
            figures += [charts.line_chart(row.title, points)] if points else []
    return figures
