"""Building blocks of a report page: self-contained HTML with inline images and SVG, light and dark.

Arguments named `..._html` are markup and are inserted unchanged; all others are escaped here.
"""

import base64
import html
import io
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from open_unitok.core.errors import UserError

from ..core.benchmark import Record
from ..core.image_files import read_sample_image
from ..core.parquet import ParquetImage
from . import charts
from .style import STYLE

IMAGE_SIDE = 256  # larger images are scaled down, so that a page has a few megabytes
DECIMALS = {"ssim": 3, "lpips": 3, "entries": 1, "points": 1}  # by unit; these units are not printed


def render_page(title: str, header_html: str, sections_html: Iterable[str], footer_html: str) -> str:
    """A complete HTML document."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<header><h1>{escape(title)}</h1>{header_html}</header>{''.join(sections_html)}"
        f'<footer class="end">{footer_html}</footer></main></body></html>\n'
    )


def escape(value: object) -> str:
    """Escape a value for HTML text and attributes."""
    return html.escape(str(value))


def section(title: str, note_html: str, body_html: str) -> str:
    """A section with a heading and a note; "" if it has no body."""
    note = f"<p>{note_html}</p>" if note_html else ""
    return f"<section><h2>{escape(title)}</h2>{note}{body_html}</section>" if body_html else ""


def grid(cards_html: Sequence[str], style: str, title: str = "") -> str:
    """Cards side by side under an optional heading; "" without cards.

    Args:
        style: a grid class of the style sheet: tiles, gallery, pairs, samples, columns or charts.
    """
    if not cards_html:
        return ""
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    return f'{heading}<div class="{style}">{"".join(cards_html)}</div>'


def html_table(
    columns: Sequence[str], rows_html: Sequence[Sequence[str]], numeric: Collection[int] = ()
) -> str:
    """A table in a card; `numeric` are the indices of the columns that are aligned right."""
    if not rows_html:
        return ""
    # class n is right-aligned; the first column stays in sight when a wide table is scrolled
    kinds = [' class="n"' if i in numeric else "" for i in range(len(columns))]
    head = "".join(f"<th{kind}><span>{escape(name)}</span></th>" for kind, name in zip(kinds, columns))
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{cell}</td>' for kind, cell in zip(kinds, row))}</tr>" for row in rows_html
    )
    return f'<div class="card scroll"><table><tr>{head}</tr>{body}</table></div>'


def collapsible(title_html: str, body_html: str, is_open: bool) -> str:
    """A block that opens and closes without a script."""
    mark = " open" if is_open else ""
    return f'<details class="card"{mark}><summary>{title_html}</summary><div>{body_html}</div></details>'


def panel(title: str, bars_html: Sequence[str]) -> str:
    """A card of bars (`charts.bar_row`) with an optional heading; "" without bars."""
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    return f'<div class="panel card">{heading}{"".join(bars_html)}</div>' if bars_html else ""


def tile(value: float, unit: str, name: str, note: str) -> str:
    """A headline number in large type."""
    # format_value separates the unit by a blank: it is printed smaller
    number, _, suffix = format_value(value, unit).partition(" ")
    small = f"<em>{escape(note)}</em>" if note else ""
    large = f"<b>{number}<small>{suffix}</small></b>"
    return f'<div class="tile card">{large}<span>{escape(name)}</span>{small}</div>'


def inline_image(path: Path | ParquetImage, alt: str) -> str:
    """An <img> with a data URL, at most 256 x 256; an unreadable image shows its file name."""
    try:
        image = read_sample_image(path)
    except UserError:
        return f'<img alt="{escape(path.name)} cannot be read">'
    # thumbnail() never enlarges
    image.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    buffer = io.BytesIO()
    # PNG: JPEG artefacts could be mistaken for those of the model
    image.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def verdict(correct: bool) -> str:
    """A tick or a cross."""
    return '<i class="verdict yes">✓</i>' if correct else '<i class="verdict no">✗</i>'


def generated_card(path: Path, prompt: str, correct: bool, notes: Sequence[str]) -> str:
    """A generated image above its prompt, with the verdict of the benchmark."""
    small = "".join(f"<small>{escape(note)}</small>" for note in notes if note)
    return (
        f'<div class="generated card">{inline_image(path, prompt)}'
        f"<div>{verdict(correct)}{escape(prompt)}{small}</div></div>"
    )


def sample_card(
    image_html: str, question: str, lines_html: Sequence[str], correct: bool | None = None
) -> str:
    """An image, its question or prompt, and lines about the answer."""
    mark = "" if correct is None else verdict(correct)
    return (
        f'<div class="sample card">{image_html}<div>{mark}<q>{escape(question)}</q>'
        f"{''.join(lines_html)}</div></div>"
    )


def metric_bar(
    label: str,
    metric: Record,
    note: str = "",
    whole: float = 1.0,
    mark: float | None = None,
    mark_name: str = "",
    shown: str = "",
) -> str:
    """A metric of a `results.json` as a bar with its interval.

    Args:
        whole: the value of a full bar.
        mark: a baseline, marked on the bar.
        shown: see `charts.bar_row`.
    """
    # the interval is scaled like the value
    interval = metric["interval"] and [value / whole for value in metric["interval"]]
    notes = [note, f"n = {metric['n']}", "" if mark is None else f"{mark_name} {percent(mark)}"]
    text = ", ".join(filter(None, notes))
    return charts.bar_row(label, metric["value"] / whole, text, interval, mark, mark_name, shown)


def warnings(problems: Iterable[str]) -> str:
    """A box per problem of a run."""
    return "".join(f'<div class="warn card">{escape(problem)}</div>' for problem in problems)


def model_and_versions(result: Record) -> str:
    """The model and the package versions of a `results.json`."""
    model = result["model"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    digest = str(model.get("fingerprint", ""))[:16]
    return f"{escape(model.get('path', ''))} <code>{escape(digest)}</code>, {escape(versions)}"


def percent(value: float) -> str:
    """A fraction in per cent."""
    return f"{100 * value:.1f} %"


def format_value(value: float, unit: str) -> str:
    """Format a value in its unit."""
    if unit == "fraction":
        return percent(value)
    if unit == "dB":
        return f"{value:.2f} dB"
    return f"{value:.{DECIMALS.get(unit, 1 if abs(value) >= 100 else 2)}f}"


def format_interval(interval: Sequence[float] | None, unit: str) -> str:
    """Format an interval without the unit; "" if there is none."""
    return " – ".join(format_value(v, unit).split()[0] for v in interval) if interval else ""
