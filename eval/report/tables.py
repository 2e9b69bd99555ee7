"""The metrics of a result arranged for reading: single ones, lists by group, tables of measures by group."""

from collections.abc import Mapping
from typing import NamedTuple

from ..core.benchmark import Record

Metrics = Mapping[str, Record]  # name -> value, n, interval, unit: "metrics" of a results.json


class MeasureTable(NamedTuple):
    """Several measures of the same groups: a row per group, a column per measure."""

    measures: list[str]
    groups: list[str]
    cells: dict[tuple[str, str], Record]  # (measure, group) -> metric


class Arranged(NamedTuple):
    """The metrics of one result."""

    single: dict[str, Record]
    lists: dict[str, dict[str, Record]]  # measure -> group -> metric
    tables: list[MeasureTable]


def arrange_metrics(metrics: Metrics) -> Arranged:
    """Sort metrics named MEASURE/GROUP into tables, where measures have the same groups, and lists."""
    single = {name: metric for name, metric in metrics.items() if "/" not in name}
    lists: dict[str, dict[str, Record]] = {}
    for name, metric in metrics.items():
        measure, slash, group = name.partition("/")
        if slash:
            lists.setdefault(measure, {})[group] = metric
    by_groups: dict[tuple[str, ...], list[str]] = {}
    for measure, groups in lists.items():
        by_groups.setdefault(tuple(groups), []).append(measure)
    tables = []
    for groups, measures in by_groups.items():
        if len(measures) > 1 and len(groups) > 1:
            cells = {(m, g): lists[m].pop(g) for m in measures for g in groups}
            tables.append(MeasureTable(measures, list(groups), cells))
    return Arranged(single, {measure: groups for measure, groups in lists.items() if groups}, tables)


def result_table(result: Record) -> str:
    """A result as lines of text: value, 95 % interval, n; then tables, problems and submission files."""
    title = f"{result['benchmark']}  ({result['n']} samples, {result['missing']} missing)"
    lines = [title, "-" * len(title)]
    if result["value"] is None:
        lines.append("  no score: upload the submission file")
    arranged = arrange_metrics(result["metrics"])
    rows = arranged.single | {
        f"{measure}/{group}": metric
        for measure, groups in arranged.lists.items()
        for group, metric in groups.items()
    }
    width = max(map(len, rows), default=0)
    for name, metric in rows.items():
        interval = metric["interval"]
        around = ""
        if interval:
            around = f"[{_with_unit(interval[0], metric)}, {_with_unit(interval[1], metric)}]"
        value = _with_unit(metric["value"], metric)
        lines.append(f"  {name:<{width}}  {value:>9}  {around:<20}  n={metric['n']}")
    for table in arranged.tables:
        lines += ["", *_text_rows(table)]
    if not result["comparable"]:
        lines.append(f"  ! not comparable with published numbers: {result['not_comparable_reason']}")
    lines += [f"  ! {problem}" for problem in result["problems"]]
    lines += [f"  > submission/{name}" for name in result.get("submission", ())]
    return "\n".join(lines)


def _text_rows(table: MeasureTable) -> list[str]:
    """The table as text."""
    head = ["", *table.measures, "n"]
    body = [
        [
            group,
            *(_with_unit(table.cells[m, group]["value"], table.cells[m, group]) for m in table.measures),
            str(table.cells[table.measures[0], group]["n"]),
        ]
        for group in table.groups
    ]
    widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]
    return [
        "  " + "  ".join(f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(row))
        for row in (head, *body)
    ]


def _with_unit(value: float, metric: Record) -> str:
    """A value in the metric's unit."""
    if metric["unit"] == "fraction":
        return f"{100 * value:.1f} %"
    if metric["unit"] == "points":
        return f"{value:.1f}"
    return f"{value:.2f} dB" if metric["unit"] == "dB" else f"{value:.3f}"
