"""Plots of a study as inline SVG: labelled points, and lines of several rows; colours come from the page."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

_WIDTH, _HEIGHT = 1040, 520
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 24, 16, 44  # margins
_CHARACTER, _LINE = 6.1, 12.0  # size of the labels
# places of a label around its point (dx, dy, anchor), the nearest first; far ones have a leader line
_PLACES = [(9, 4, "start"), (-9, 4, "end"), (0, -9, "middle"), (0, 17, "middle")] + [
    (dx, dy, "start" if dx > 0 else "end")
    for far in range(1, 9)
    for dy in (4 - 12 * far, 4 + 12 * far)
    for dx in (14, -14, 40, -40)
]


class Point(NamedTuple):
    """A labelled point; `group` is a number of the page's colours."""

    name: str
    x: float
    y: float
    group: int = 0
    title: str = ""


def scatter_svg(points: Sequence[Point], x_title: str, y_title: str, log: bool = False) -> str:
    """Points with labels that do not cover each other; `log`: powers of two on the x-axis."""
    xs = [math.log2(point.x) if log else point.x for point in points]
    (x0, x1), (y0, y1) = _range(xs, 0.05), _range([point.y for point in points], 0.07)

    def across(x: float) -> float:
        return _LEFT + (x - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT)

    def down(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - y0) / (y1 - y0) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for value in [*range(math.ceil(x0), math.floor(x1) + 1)] if log else ticks(x0, x1):
        at, shown = across(value), f"{2**value:g}" if log else f"{value:g}"
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text x="{at:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{shown}</text>')
    for value in ticks(y0, y1):
        at = down(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 3.5:.1f}" text-anchor="end">{value:g}</text>')
    parts += _axis_titles(x_title, y_title)
    places = [(across(x), down(point.y)) for x, point in zip(xs, points)]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    # from the top: labels of a column of points move apart in its order
    for i in sorted(range(len(points)), key=lambda i: places[i][1]):
        parts += _labelled(points[i], *places[i], taken)
    return _svg(f"{y_title} over {x_title}", parts)


def _labelled(point: Point, x: float, y: float, taken: list[tuple[float, float, float, float]]) -> list[str]:
    """A point and its label at the first place that is free; the box of the label is added to `taken`."""
    width, boxes = _CHARACTER * len(point.name), []
    for dx, dy, anchor in _PLACES:
        left = x + dx - {"start": 0, "end": width, "middle": width / 2}[anchor]
        boxes.append((left, y + dy - _LINE + 2, left + width, y + dy + 2))
    free = [k for k, box in enumerate(boxes) if _inside(box) and not any(_overlap(box, t) for t in taken)]
    chosen = free[0] if free else 0
    taken.append(boxes[chosen])
    dx, dy, anchor = _PLACES[chosen]
    parts = []
    if chosen >= 4:
        end = x + dx + (-3 if dx > 0 else 3)
        parts.append(f'<line class="leader" x1="{x:.1f}" y1="{y:.1f}" x2="{end:.1f}" y2="{y + dy - 4:.1f}"/>')
    parts.append(
        f'<circle class="dot g{point.group}" cx="{x:.1f}" cy="{y:.1f}" r="4.5">'
        f"<title>{html.escape(point.title or point.name)}</title></circle>"
    )
    label = f'<text class="label" x="{x + dx:.1f}" y="{y + dy:.1f}" text-anchor="{anchor}">'
    return [*parts, f"{label}{html.escape(point.name)}</text>"]


def _inside(box: tuple[float, float, float, float]) -> bool:
    return box[0] > _LEFT and box[2] < _WIDTH - 4 and box[1] > 2 and box[3] < _HEIGHT - _BOTTOM


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def lines_svg(lines: Sequence[tuple[str, Sequence[Sequence[float]]]], x_title: str, y_title: str) -> str:
    """Named curves of (x, y), each with its name at its end."""
    points = [point for _, curve in lines for point in curve]
    (x0, x1), (y0, y1) = _range([p[0] for p in points], 0.02), _range([p[1] for p in points], 0.08)
    right = _RIGHT + _CHARACTER * max(len(name) for name, _ in lines) + 12

    def across(x: float) -> float:
        return _LEFT + (x - x0) / (x1 - x0) * (_WIDTH - _LEFT - right)

    def down(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - y0) / (y1 - y0) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for value in ticks(y0, y1):
        at = down(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 3.5:.1f}" text-anchor="end">{value:g}</text>')
    for value in sorted({p[0] for p in points}):
        at = f"{across(value):.1f}"
        parts.append(f'<text x="{at}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
    parts += _axis_titles(x_title, y_title)
    last = -math.inf
    # names from the top, each below the one before
    for number, (name, curve) in sorted(enumerate(lines), key=lambda item: -item[1][1][-1][1]):
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in curve)
        parts.append(f'<polyline class="line g{number}" points="{path}"/>')
        parts += [
            f'<circle class="dot g{number}" cx="{across(x):.1f}" cy="{down(y):.1f}" r="3"/>' for x, y in curve
        ]
        last = max(down(curve[-1][1]) + 4, last + _LINE + 1)
        at = f'x="{across(curve[-1][0]) + 10:.1f}" y="{last:.1f}"'
        parts.append(f'<text class="label g{number}" {at}>{html.escape(name)}</text>')
    return _svg(f"{y_title} over {x_title}", parts)


def _svg(title: str, parts: Sequence[str]) -> str:
    name = f'role="img" aria-label="{html.escape(title)}"'
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" {name}>{"".join(parts)}</svg>'


def _axis_titles(x_title: str, y_title: str) -> list[str]:
    return [
        f'<text class="axis" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 8}" text-anchor="end">'
        f"{html.escape(x_title)}</text>",
        f'<text class="axis" x="{_LEFT}" y="{_TOP - 4}">{html.escape(y_title)}</text>',
    ]


def _range(values: Sequence[float], margin: float) -> tuple[float, float]:
    """From the least to the greatest with a margin; never empty."""
    low, high = min(values), max(values)
    space = margin * (high - low) or max(abs(high) * 0.05, 0.5)
    return low - space, high + space


def ticks(low: float, high: float, count: int = 8) -> list[float]:
    """About `count` round numbers between low and high."""
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    return [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
