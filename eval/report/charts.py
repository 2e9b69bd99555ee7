"""Small charts as inline SVG that follow the page's colours, and the numbers behind their axes."""

import html
import math
from collections.abc import Sequence

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 14, 26


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers from low to high."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number in few characters: 1.2k, 0.35, 12."""
    if abs(value) >= 10_000 or (abs(value) >= 1000 and value % 1000 == 0):
        return f"{value / 1000:g}k"
    if value and abs(value) < 0.001:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def bounds(points: Points) -> tuple[float, float, float, float]:
    """x0, x1, y0, y1 of a curve, never empty; the first hundredth does not squash the rest."""
    xs = [x for x, _ in points]
    ordered = sorted(y for _, y in points)
    low, high = ordered[0], ordered[max(math.ceil(0.99 * len(ordered)) - 1, 0)]
    margin = 0.06 * (high - low) or abs(high) * 0.05 or 1.0
    floor = 0.0 if 0 <= low < 0.3 * high else low - margin
    return min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, floor, high + margin


def smooth(points: Points, window: int) -> list[tuple[float, float]]:
    """A centred running mean over `window` points."""
    half = window // 2
    result = []
    for i, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, i - half) : i + half + 1]]
        result.append((x, sum(near) / len(near)))
    return result


def thin(points: Points, most: int = 400) -> list[tuple[float, float]]:
    """At most about `most` of the points, evenly chosen, the last one always."""
    step = max(1, math.ceil(len(points) / most))
    return [*points[: len(points) - 1 : step], points[-1]]


def line_chart(title: str, points: Points) -> str:
    """One curve over steps, with its last value beside the title."""
    points = thin([(x, y) for x, y in points if math.isfinite(y)])
    x0, x1, y0, y1 = bounds(points)

    def place(x: float, y: float) -> str:
        across = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - (min(max(y, y0), y1) - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)
        return f"{across:.1f},{down:.1f}"

    parts = []
    for value in ticks(y0, y1):
        at = place(x0, value).split(",")[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at}" dy="3.5" text-anchor="end">{short(value)}</text>')
    for value in ticks(x0, x1):
        at = place(value, y0).split(",")[0]
        parts.append(f'<text x="{at}" y="{HEIGHT - 8}" text-anchor="middle">{short(value)}</text>')
    curve = smooth(points, 7) if len(points) > 30 else list(points)
    path = " ".join(place(x, y) for x, y in curve)
    raw = " ".join(place(x, y) for x, y in points)
    base = HEIGHT - BOTTOM
    area = f"{place(*curve[0]).split(',')[0]},{base} {path} {place(*curve[-1]).split(',')[0]},{base}"
    parts.append(f'<polygon class="area" points="{area}"/>')
    if len(points) > 30:
        parts.append(f'<polyline class="raw" points="{raw}"/>')
    parts.append(f'<polyline class="curve" points="{path}"/>')
    end = place(*curve[-1]).split(",")
    parts.append(f'<circle class="dot" cx="{end[0]}" cy="{end[1]}" r="3"/>')
    name = html.escape(title)
    return (
        f'<figure class="chart"><figcaption><b>{name}</b><span>{short(points[-1][1])}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name} over steps">'
        f"{''.join(parts)}</svg></figure>"
    )


def bar_row(
    name: str,
    value: float,
    note: str,
    interval: Sequence[float] | None = None,
    mark: float | None = None,
    mark_name: str = "",
) -> str:
    """A horizontal bar of a share, with its 95 % interval as a whisker and a mark to compare with."""
    parts = [f'<i class="fill" style="width:{100 * min(max(value, 0), 1):.1f}%"></i>']
    if interval:
        low, high = (100 * min(max(v, 0), 1) for v in interval)
        parts.append(f'<i class="whisker" style="left:{low:.1f}%;width:{max(high - low, 0.3):.1f}%"></i>')
    if mark is not None:
        title = html.escape(f"{mark_name}: {100 * mark:.1f} %")
        parts.append(f'<i class="mark" style="left:{100 * min(max(mark, 0), 1):.1f}%" title="{title}"></i>')
    return (
        f'<div class="bar"><span>{html.escape(name)}</span><div class="track">{"".join(parts)}</div>'
        f"<b>{100 * value:.1f}</b><small>{html.escape(note)}</small></div>"
    )


def histogram(title: str, values: Sequence[float], unit: str, bins: int = 24) -> str:
    """How values are spread, as a bar per bin."""
    low, high = min(values), max(values)
    width = (high - low) / bins or 1.0
    counts = [0] * bins
    for value in values:
        counts[min(int((value - low) / width), bins - 1)] += 1
    step = (WIDTH - LEFT - RIGHT) / bins
    parts = []
    for i, count in enumerate(counts):
        tall = count / max(counts) * (HEIGHT - TOP - BOTTOM)
        parts.append(
            f'<rect class="bin" x="{LEFT + i * step + 0.7:.1f}" y="{HEIGHT - BOTTOM - tall:.1f}" '
            f'width="{step - 1.4:.1f}" height="{tall:.1f}" rx="1.5">'
            f"<title>{short(low + i * width)} {unit}: {count}</title></rect>"
        )
    for value in ticks(low, high):
        at = LEFT + (value - low) / ((high - low) or 1.0) * (WIDTH - LEFT - RIGHT)
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{short(value)}</text>')
    name = html.escape(title)
    mean = short(sum(values) / len(values))
    return (
        f'<figure class="chart"><figcaption><b>{name}</b><span>mean {mean} {unit}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{"".join(parts)}</svg></figure>'
    )
