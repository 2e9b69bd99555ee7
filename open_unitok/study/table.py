"""The table of a study: means and spreads over seeds, and significant differences from the baseline."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from open_unitok.core.text_files import read_json
from open_unitok.eval.core.bootstrap import mean_columns, paired_bootstrap

from .config import Study

NOT_RUN, NOT_AVAILABLE = "not run", "n/a"


class Column(NamedTuple):
    """A column of the table; `places` are decimals after multiplying by `scale`."""

    key: str
    title: str
    places: int = 1
    scale: float = 1.0


# of the model itself, then per split
MODEL_COLUMNS = (
    Column("tokens", "tokens", 0),
    Column("bits", "bits", 0),
    Column("parameters", "parameters, M", 2),
    Column("step_seconds", "s per step", 2),
    Column("encode_ms", "encode, ms", 1),
    Column("decode_ms", "decode, ms", 1),
)
SPLIT_COLUMNS = (
    Column("psnr", "PSNR, dB", 2),
    Column("ssim", "SSIM", 3),
    Column("emoji", "nearest: emoji, %", 1, 100),
    Column("in_style", "and style, %", 1, 100),
    Column("frechet", "FD (EfficientNet-Lite0)", 1),
    Column("usage", "entries used, %", 0, 100),
    Column("perplexity", "perplexity", 0),
    Column("agreement", "codes kept, %", 0, 100),
    Column("retrieval", "R@1 of 100, %", 1, 100),
    Column("zeroshot_category", "zero-shot category, %", 1, 100),
    Column("probe_category", "probe category, %", 1, 100),
    Column("probe_style", "probe style, %", 1, 100),
)


class Cell(NamedTuple):
    """Mean and half range over the seeds; `significant`: the interval of its difference excludes zero."""

    value: float | None
    spread: float | None
    significant: bool
    reason: str = ""  # why there is no value


def read_results(study: Study) -> dict[str, list[dict[str, Any]]]:
    """Row -> its results, by seed; rows that were not run have none."""
    return {
        name: [
            read_json(path)
            for seed in study.seeds
            if (path := Path(study.results, f"{name}-{seed}.json")).exists()
        ]
        for name in study.rows
    }


def make_cells(study: Study, split: str | None) -> dict[str, list[Cell]]:
    """Row -> cells of `MODEL_COLUMNS`, or of `SPLIT_COLUMNS` of a split."""
    results = read_results(study)
    baseline = results[study.baseline]
    columns = SPLIT_COLUMNS if split else MODEL_COLUMNS
    table = {}
    for name, found in results.items():
        cells = []
        for column in columns:
            values = [_value(result, split, column.key) for result in found]
            known = [value for value in values if value is not None]
            if not known:
                cells.append(Cell(None, None, False, NOT_AVAILABLE if found else NOT_RUN))
                continue
            spread = (max(known) - min(known)) / 2 if len(known) > 1 else None
            significant = name != study.baseline and _differs(baseline, found, split, column.key)
            cells.append(Cell(float(np.mean(known)), spread, significant))
        table[name] = cells
    return table


def _value(result: dict[str, Any], split: str | None, key: str) -> float | None:
    return (result["splits"].get(split, {}) if split else result["columns"]).get(key)


def _differs(baseline: Sequence[dict], found: Sequence[dict], split: str | None, key: str) -> bool:
    """Whether the paired bootstrap over images, scores averaged over seeds, excludes zero."""
    if split is None:  # sizes and times
        return False
    sides = []
    for results in (baseline, found):
        scores = [result["images"].get(split, {}).get(key) for result in results]
        if not scores or None in scores or len({len(score) for score in scores}) > 1:
            return False
        sides.append(np.mean(scores, axis=0))
    if len(sides[0]) != len(sides[1]):
        return False
    interval = paired_bootstrap(mean_columns(sides[0]), mean_columns(sides[1])).interval
    return interval is not None and not interval[0] <= 0 <= interval[1]


def format_cell(cell: Cell, column: Column, bold: bool = True) -> str:
    """ "19.72 ± 0.05", in bold if significant; without a value the reason."""
    if cell.value is None:
        return cell.reason
    text = f"{cell.value * column.scale:.{column.places}f}"
    if cell.spread is not None and not math.isclose(cell.spread, 0, abs_tol=1e-12):
        text += f" ± {cell.spread * column.scale:.{column.places}f}"
    return f"**{text}**" if cell.significant and bold else text


def markdown_table(study: Study) -> str:
    """The tables of a study: one of the models, and one per split."""
    parts = []
    for split in (None, *study.splits):
        columns = SPLIT_COLUMNS if split else MODEL_COLUMNS
        lines = [
            f"### {f'On `{split}`' if split else 'Sizes and times'}",
            "",
            f"| row | {' | '.join(column.title for column in columns)} |",
            f"|---|{'---|' * len(columns)}",
        ]
        for name, cells in make_cells(study, split).items():
            shown = " | ".join(format_cell(cell, column) for cell, column in zip(cells, columns))
            lines.append(f"| `{name}`: {study.rows[name].title} | {shown} |")
        parts.append("\n".join(lines) + "\n")
    seeds = ", ".join(map(str, study.seeds))
    note = (
        f"Mean over seeds {seeds} ± half of their range. Bold: differs from `{study.baseline}` "
        "(paired bootstrap over images, 95 %).\n"
    )
    return "\n".join([note, *parts])


def csv_table(study: Study) -> str:
    """One line per row, seed and split, with the unrounded values."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    model, quality = [c.key for c in MODEL_COLUMNS], [c.key for c in SPLIT_COLUMNS]
    writer.writerow(["row", "seed", "split", *model, *quality, "processor"])
    for name, results in read_results(study).items():
        for result in results:
            for split, columns in result["splits"].items():
                values = [*map(result["columns"].get, model), *map(columns.get, quality)]
                writer.writerow([name, result["seed"], split, *values, result["processor"]])
    return buffer.getvalue()
