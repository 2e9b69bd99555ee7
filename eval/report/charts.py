"""Line charts, bars and histograms as inline SVG; colours come from the style sheet of the page."""

import html
import math
from collections.abc import Sequence

Points = Sequence[tuple[float, float]]
_WIDTH, _HEIGHT = 340, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 14, 14, 26  # margins


def line_chart(title: str, points: Points) -> str:
    """A curve over steps, with its last value next to the title."""
    # NaN and infinity have no position in a chart
    points = _thin([(x, y) for x, y in points if math.isfinite(y)])
    x0, x1, y0, y1 = _bounds(points)

    def to_svg(x: float, y: float) -> str:
        # SVG's y axis points down; values outside of the bounds are clipped
        across = _LEFT + (x - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT)
        down = _HEIGHT - _BOTTOM - (min(max(y, y0), y1) - y0) / (y1 - y0) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{across:.1f},{down:.1f}"

    parts = []
    for value in _ticks(y0, y1):
        at = to_svg(x0, value).split(",")[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at}" dy="3.5" text-anchor="end">{_short(value)}</text>')
    for value in _ticks(x0, x1):
        at = to_svg(value, y0).split(",")[0]
        parts.append(f'<text x="{at}" y="{_HEIGHT - 8}" text-anchor="middle">{_short(value)}</text>')
    # smoothing a short curve would hide half of its points
    curve = _smooth(points, 7) if len(points) > 30 else list(points)
    path = " ".join(to_svg(x, y) for x, y in curve)
    raw = " ".join(to_svg(x, y) for x, y in points)
    base = _HEIGHT - _BOTTOM
    area = f"{to_svg(*curve[0]).split(',')[0]},{base} {path} {to_svg(*curve[-1]).split(',')[0]},{base}"
    # painted in order: area, raw values, smoothed curve, last value
    parts.append(f'<polygon class="area" points="{area}"/>')
    if len(points) > 30:
        parts.append(f'<polyline class="raw" points="{raw}"/>')
    parts.append(f'<polyline class="curve" points="{path}"/>')
    end = to_svg(*curve[-1]).split(",")
    parts.append(f'<circle class="dot" cx="{end[0]}" cy="{end[1]}" r="3"/>')
    name = html.escape(title)
    return (
        f'<figure class="chart"><figcaption><b>{name}</b><span>{_short(points[-1][1])}</span></figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name} over steps">'
        f"{''.join(parts)}</svg></figure>"
    )


def bar_row(
    name: str,
    value: float,
    note: str,
    interval: Sequence[float] | None = None,
    mark: float | None = None,
    mark_name: str = "",
    shown: str = "",
) -> str:
    """A horizontal bar of a fraction, with its interval as a whisker and `mark` as a baseline.

    Args:
        shown: the value in words; the default is per cent.
    """
    parts = [f'<i class="fill" style="width:{100 * min(max(value, 0), 1):.1f}%"></i>']
    if interval:
        low, high = (100 * min(max(v, 0), 1) for v in interval)
        parts.append(f'<i class="whisker" style="left:{low:.1f}%;width:{max(high - low, 0.3):.1f}%"></i>')
    if mark is not None:
        title = html.escape(f"{mark_name}: {100 * mark:.1f} %")
        parts.append(f'<i class="mark" style="left:{100 * min(max(mark, 0), 1):.1f}%" title="{title}"></i>')
    return (
        f'<div class="bar"><span>{html.escape(name)}</span><div class="track">{"".join(parts)}</div>'
        f"<b>{html.escape(shown or f'{100 * value:.1f}')}</b><small>{html.escape(note)}</small></div>"
    )


def histogram(title: str, values: Sequence[float], unit: str, bins: int = 24) -> str:
    """The distribution of values, as a bar per bin."""
    low, high = min(values), max(values)
    width = (high - low) / bins or 1.0  # all values equal: one bar
    counts = [0] * bins
    for value in values:
        counts[min(int((value - low) / width), bins - 1)] += 1
    step = (_WIDTH - _LEFT - _RIGHT) / bins
    parts = []
    for i, count in enumerate(counts):
        height = count / max(counts) * (_HEIGHT - _TOP - _BOTTOM)
        parts.append(
            f'<rect class="bin" x="{_LEFT + i * step + 0.7:.1f}" y="{_HEIGHT - _BOTTOM - height:.1f}" '
            f'width="{step - 1.4:.1f}" height="{height:.1f}" rx="1.5">'
            f"<title>{_short(low + i * width)} {unit}: {count}</title></rect>"
        )
    for value in _ticks(low, high):
        at = _LEFT + (value - low) / ((high - low) or 1.0) * (_WIDTH - _LEFT - _RIGHT)
        parts.append(f'<text x="{at:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{_short(value)}</text>')
    name = html.escape(title)
    mean = _short(sum(values) / len(values))
    return (
        f'<figure class="chart"><figcaption><b>{name}</b><span>mean {mean} {unit}</span></figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers between low and high."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    # 1, 2, 2.5 or 5 times a power of ten
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _short(value: float) -> str:
    """A number in few characters: 12k, 0.35, 1e-5."""
    if abs(value) >= 10_000 or (abs(value) >= 1000 and value % 1000 == 0):
        return f"{value / 1000:g}k"
    if value and abs(value) < 0.001:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _bounds(points: Points) -> tuple[float, float, float, float]:
    """x0, x1, y0, y1 of the axes, never an empty range."""
    xs = [x for x, _ in points]
    # ignore the largest 1 %: the first steps of a loss would flatten the rest of its curve
    ordered = sorted(y for _, y in points)
    low, high = ordered[0], ordered[max(math.ceil(0.99 * len(ordered)) - 1, 0)]
    margin = 0.06 * (high - low) or abs(high) * 0.05 or 1.0
    # start at zero if that wastes little space, so that heights are comparable
    floor = 0.0 if 0 <= low < 0.3 * high else low - margin
    return min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, floor, high + margin


def _smooth(points: Points, window: int) -> list[tuple[float, float]]:
    """A centred running mean over `window` points."""
    half = window // 2
    result = []
    for i, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, i - half) : i + half + 1]]
        result.append((x, sum(near) / len(near)))
    return result


def _thin(points: Points, most: int = 400) -> list[tuple[float, float]]:
    """About `most` evenly spaced points, including the last."""
    # keeps a page of long runs small
    step = max(1, math.ceil(len(points) / most))
    return [*points[: len(points) - 1 : step], points[-1]]
