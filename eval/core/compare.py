"""Is run B better than run A? A paired bootstrap over images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing, read_json, read_jsonl

from ..understanding import mme, pope
from .bootstrap import (
    Difference,
    Statistic,
    f1_statistic,
    group_mean_columns,
    group_mean_statistic,
    mean_columns,
    mean_statistic,
    paired_bootstrap,
)
from .harness import Record


class Line(NamedTuple):
    """One number of both runs."""

    name: str
    a: float
    b: float
    difference: Difference
    n: int
    unit: str


def f1_columns(rows: list[Record]) -> np.ndarray:
    """POPE's counts per category."""
    names = list(dict.fromkeys(row["group"] for row in rows))
    return pope.columns([(row["parsed"], row["truth"], row["group"]) for row in rows], names)


# What makes a benchmark's main number of its rows: (rows -> columns, sums -> value, unit).
STATISTICS: dict[str, tuple[Callable[[list[Record]], np.ndarray], Statistic, str]] = {
    "mean": (lambda rows: mean_columns([row["score"] for row in rows]), mean_statistic, "share"),
    "group mean": (
        lambda rows: group_mean_columns([row["score"] for row in rows], [row["group"] for row in rows]),
        group_mean_statistic,
        "share",
    ),
    "f1": (f1_columns, f1_statistic, "share"),
    "mme": (mme.columns, mme.total, "points"),
}


def folders_of(path: str | Path) -> dict[str, Path]:
    """Benchmark -> the folder with its results, of a folder of one benchmark or of several.

    Raises:
        UserError: nothing there was scored.
    """
    path = existing(path)
    folders = [path] if (path / "results.json").exists() else [p.parent for p in path.glob("*/results.json")]
    if not folders:
        raise UserError(f"{path} holds no results.json: run `unitok eval run` or `unitok eval score` first.")
    return {read_json(folder / "results.json")["benchmark"]: folder for folder in sorted(folders)}


def compare(a: str | Path, b: str | Path) -> list[Line]:
    """The main number of both runs and the means of its groups, with the difference of each.

    Raises:
        UserError: the runs differ in benchmark, split, scorer or samples, or have no score per sample.
    """
    results = [read_json(Path(folder) / "results.json") for folder in (a, b)]
    for key in ("benchmark", "split", "scorer", "statistic"):
        first, second = (result.get(key) for result in results)
        if first != second:
            raise UserError(f"{a} and {b} cannot be compared: {key} is {first!r} and {second!r}.")
    statistic = results[0]["statistic"]
    rows = [counted(Path(folder) / "scores.jsonl", statistic) for folder in (a, b)]
    if [key_of(row) for row in rows[0]] != [key_of(row) for row in rows[1]]:
        raise UserError(f"{a} and {b} cannot be compared: they are not about the same samples.")
    columns, value, unit = STATISTICS[statistic]
    main = results[0]["metric"]
    lines = [line_of(main, rows, columns, value, results[0]["metrics"][main]["unit"])]
    if any(abs(v - r["value"]) > 1e-6 for v, r in zip((lines[0].a, lines[0].b), results)):
        # the main number is made of something else than the rows' scores, such as FID
        lines = [lines[0]._replace(name="score per sample", unit="points")]
    columns, value, _ = STATISTICS["mean"]
    groups = list(dict.fromkeys(row.get("group") or "" for row in rows[0]))
    for group in groups if len(groups) > 1 else ():
        chosen = [[row for row in side if (row.get("group") or "") == group] for side in rows]
        lines.append(line_of(f"  {group}", chosen, columns, value, "share" if unit == "points" else unit))
    return lines


def counted(path: Path, statistic: str) -> list[Record]:
    """The rows that make the main number, in order."""
    rows = [
        row
        for row in read_jsonl(path)
        if row.get("score") is not None and not row.get("held_out") and row.get("kind") != "reconstruct"
    ]
    if statistic == "mme" and any(row["group"] in mme.PERCEPTION for row in rows):
        rows = [row for row in rows if row["group"] in mme.PERCEPTION]
    if not rows or statistic not in STATISTICS:
        raise UserError(f"{path}: there is no score per sample to compare (FID and its like have none).")
    return rows


def key_of(row: Record) -> tuple[Any, ...]:
    """What says that two rows are about the same sample."""
    return row["index"], row.get("id"), row.get("question"), row.get("truth") if "question" in row else None


def line_of(
    name: str,
    rows: list[list[Record]],
    columns: Callable[[list[Record]], np.ndarray],
    value: Statistic,
    unit: str,
) -> Line:
    """One number of both sides."""
    first, second = (columns(side) for side in rows)
    clusters = [row.get("cluster", row.get("owner", row["index"])) for row in rows[0]]
    a, b = (float(value(side.sum(axis=0))) for side in (first, second))
    return Line(name, a, b, paired_bootstrap(first, second, clusters, value), len(rows[0]), unit)


def table(name: str, lines: list[Line]) -> str:
    """Lines of text: A, B, B - A with its interval and p."""
    width = max(len(line.name) for line in lines)
    title = f"{name}: {'A':>{width - len(name) + 9}}  {'B':>9}  {'B - A':>9}  95 % interval      p"
    rows = [title, "-" * len(title)]
    for line in lines:
        scale = 100 if line.unit == "share" else 1
        around = ""
        if line.difference.interval is not None:
            low, high = (scale * v for v in line.difference.interval)
            around = f"[{low:+.2f}, {high:+.2f}]  p={line.difference.p:.3f}"
            around += "" if low <= 0 <= high else "  *"
        values = f"{scale * line.a:>9.2f}  {scale * line.b:>9.2f}  {scale * line.difference.value:>+9.2f}"
        rows.append(f"{line.name:<{width}}  {values}  {around}  n={line.n}")
    return "\n".join([*rows, "(* = the interval does not hold zero; shares in per cent)"])
