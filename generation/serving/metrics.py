"""Counters, gauges and histograms in Prometheus' text format, as small as a server of one model needs."""

import threading
from bisect import bisect_left
from collections.abc import Callable

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
Labels = tuple[tuple[str, str], ...]


class Metrics:
    """All numbers of one server; safe to use from every thread.

    `count` adds to a counter, `observe` puts a value into a histogram, `gauge` registers what is asked for
    when the page is read. Names and labels come from the code alone, never from a request: their number
    must not grow with the traffic.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._help: dict[str, tuple[str, str]] = {}
        self._counters: dict[str, dict[Labels, float]] = {}
        self._gauges: dict[str, Callable[[], float]] = {}
        self._buckets: dict[str, tuple[float, ...]] = {}
        self._histograms: dict[str, dict[Labels, list[float]]] = {}

    def counter(self, name: str, text: str) -> None:
        """Announce a counter."""
        self._help[name], self._counters[name] = ("counter", text), {}

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Announce a gauge and where its value comes from."""
        self._help[name], self._gauges[name] = ("gauge", text), value

    def histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> None:
        """Announce a histogram and the upper bounds of its buckets."""
        self._help[name], self._histograms[name] = ("histogram", text), {}
        self._buckets[name] = buckets

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        key = tuple(labels.items())
        with self._lock:
            rows = self._counters[name]
            rows[key] = rows.get(key, 0) + amount

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Put one value into a histogram."""
        key, bounds = tuple(labels.items()), self._buckets[name]
        with self._lock:
            row = self._histograms[name].setdefault(key, [0.0] * (len(bounds) + 2))
            row[bisect_left(bounds, value)] += 1
            row[-1] += value

    def text(self) -> str:
        """The page that Prometheus reads."""
        lines = []
        with self._lock:
            for name, (kind, text) in self._help.items():
                lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
                if kind == "counter":
                    lines += [_line(name, key, value) for key, value in self._counters[name].items()]
                elif kind == "gauge":
                    lines.append(_line(name, (), self._gauges[name]()))
                else:
                    for key, row in self._histograms[name].items():
                        lines += self._histogram_lines(name, key, row)
        return "\n".join(lines) + "\n"

    def _histogram_lines(self, name: str, key: Labels, row: list[float]) -> list[str]:
        lines, total = [], 0.0
        for bound, number in zip([*map(str, self._buckets[name]), "+Inf"], row):
            total += number
            lines.append(_line(f"{name}_bucket", (*key, ("le", bound)), total))
        return [*lines, _line(f"{name}_sum", key, row[-1]), _line(f"{name}_count", key, total)]


def _line(name: str, labels: Labels, value: float) -> str:
    inside = ",".join(f'{key}="{text}"' for key, text in labels)
    number = f"{value:.15g}"  # with fewer digits a counter of millions would stand still
    return f"{name}{{{inside}}} {number}" if inside else f"{name} {number}"
