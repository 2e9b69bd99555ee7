"""The tables of a study: means and spreads over seeds, and significant differences from the baseline."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from open_unitok.core.errors import UserError
from open_unitok.core.text_files import read_json
from open_unitok.eval.core.bootstrap import mean_columns, paired_bootstrap

from .columns import Column, Table, study_tables
from .config import Study
from .jobs import study_jobs
from .requirements import missing_for

NOT_RUN, NOT_AVAILABLE = "not run", "n/a"


class Cell(NamedTuple):
    """Mean and half range over the seeds; `significant`: the interval of its difference excludes zero."""

    value: float | None
    spread: float | None
    significant: bool
    reason: str = ""  # why there is no value: "n/a" or "not run", and after a colon the details


Results = dict[str, list[dict[str, Any]]]


def read_results(study: Study) -> Results:
    """Row -> its results, by seed; rows that were not run have none.

    Raises:
        UserError: a file is not a result.
    """
    results: Results = {}
    for name in study.rows:
        results[name] = []
        for seed in study.seeds:
            path = Path(study.results, name, f"{seed}.json")
            if path.exists():
                result = read_json(path)
                if not isinstance(result, dict) or not {"columns", "splits", "images"} <= result.keys():
                    raise UserError(f"{path} is not a result of a study: remove it and repeat.")
                results[name].append(result)
    return results


def make_cells(study: Study, table: Table, results: Results | None = None) -> dict[str, list[Cell]]:
    """Row -> cells of the table's columns."""
    results = read_results(study) if results is None else results
    baseline, cells = results[study.baseline], {}
    for name, found in results.items():
        cells[name] = []
        for column in table.columns:
            known = [v for r in found if (v := value_of(r, table.split, column.key)) is not None]
            if not known:
                reasons = [r.get("reasons", {}).get(column.key, NOT_AVAILABLE) for r in found]
                cells[name].append(Cell(None, None, False, reasons[0] if reasons else NOT_RUN))
                continue
            spread = (max(known) - min(known)) / 2 if len(known) > 1 else None
            differs = name != study.baseline and _differs(baseline, found, table.split, column.key)
            cells[name].append(Cell(float(np.mean(known)), spread, differs))
    return cells


def value_of(result: dict[str, Any], split: str | None, key: str) -> float | None:
    """A column of a result."""
    return (result["splits"].get(split, {}) if split else result["columns"]).get(key)


def scores_of(results: Sequence[dict], split: str | None, key: str) -> np.ndarray | None:
    """(M,) scores per image, averaged over seeds; None where not every seed has them."""
    scores = [result["images"].get(split, {}).get(key) for result in results]
    if not scores or None in scores or len({len(score) for score in scores}) > 1:
        return None
    return np.mean(scores, axis=0)


def _differs(baseline: Sequence[dict], found: Sequence[dict], split: str | None, key: str) -> bool:
    """Whether the paired bootstrap over images, scores averaged over seeds, excludes zero."""
    a, b = (scores_of(results, split, key) for results in (baseline, found))
    if a is None or b is None or len(a) != len(b):  # sizes and times have no scores
        return False
    interval = paired_bootstrap(mean_columns(a), mean_columns(b)).interval
    return interval is not None and not interval[0] <= 0 <= interval[1]


def format_cell(cell: Cell, column: Column, bold: bool = True) -> str:
    """ "19.72 ± 0.05", in bold if significant; without a value "n/a" or "not run"."""
    if cell.value is None:
        return cell.reason.partition(":")[0]
    text = f"{cell.value * column.scale:.{column.places}f}"
    if cell.spread is not None and not math.isclose(cell.spread, 0, abs_tol=1e-12):
        text += f" ± {cell.spread * column.scale:.{column.places}f}"
    return f"**{text}**" if cell.significant and bold else text


def reasons_of(study: Study, results: Results) -> list[tuple[str, list[str]]]:
    """Why cells have no value, and the rows of each reason."""
    found: dict[str, list[str]] = {}
    titles = {column.key: column.title for table in study_tables(study) for column in table.columns}
    missing = {job.row: missing_for(job) for job in study_jobs(study, study.seeds[:1])}
    for name in study.rows:
        if not results[name]:
            why = f"not run: {missing[name]}" if missing[name] else "not run yet"
            found.setdefault(why, []).append(name)
            continue
        by_reason: dict[str, list[str]] = {}
        for column, reason in results[name][0].get("reasons", {}).items():
            by_reason.setdefault(reason, []).append(str(titles.get(column, column)).removesuffix(", %"))
        for reason, columns in by_reason.items():
            found.setdefault(f"{reason} ({', '.join(dict.fromkeys(columns))})", []).append(name)
    return list(found.items())


def processors(results: Results) -> list[str]:
    """The machines that measured the rows."""
    return sorted({result["processor"] for found in results.values() for result in found})


def markdown_table(study: Study) -> str:
    """The tables of a study."""
    results, parts = read_results(study), []
    for table in study_tables(study):
        columns = table.columns
        head = f"| row | {' | '.join(column.title for column in columns)} |"
        lines = [f"### {table.title}", "", head, f"|---|{'---|' * len(columns)}"]
        for name, cells in make_cells(study, table, results).items():
            shown = " | ".join(format_cell(cell, column) for cell, column in zip(cells, columns))
            lines.append(f"| `{name}`: {study.rows[name].title} | {shown} |")
        parts.append("\n".join(lines) + "\n")
    finished = sum(map(len, results.values()))
    seeds = sorted({result["seed"] for found in results.values() for result in found})
    note = (
        f"{finished} of {len(study.rows) * len(study.seeds)} runs, seeds {', '.join(map(str, seeds))}"
        f"{'; measured on ' + '; '.join(processors(results)) if finished else ''}. "
        "Mean over seeds ± half of their range. "
        f"Bold: differs from `{study.baseline}` (paired bootstrap over images, 95 %)."
    )
    reasons = [
        f"- {reason}: {', '.join(f'`{n}`' for n in names)}" for reason, names in reasons_of(study, results)
    ]
    return "\n".join([note + "\n", *parts, *reasons]).rstrip() + "\n"


def csv_table(study: Study) -> str:
    """One line per row, seed and split, with the unrounded values."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    tables = study_tables(study)
    model = [c.key for table in tables if table.split is None for c in table.columns]
    quality = dict.fromkeys(c.key for table in tables if table.split for c in table.columns)
    writer.writerow(["row", "seed", "split", *model, *quality, "processor"])
    for name, results in read_results(study).items():
        for result in results:
            for split, columns in result["splits"].items():
                values = [*map(result["columns"].get, model), *map(columns.get, quality)]
                writer.writerow([name, result["seed"], split, *values, result["processor"]])
    return buffer.getvalue()
