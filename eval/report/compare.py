"""Comparison of two runs of a benchmark: a paired bootstrap over images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing
from open_unitok.core.text_files import read_json_lines

from ..core.annotations import read_json_as, require_key, require_type
from ..core.benchmark import Record
from ..core.bootstrap import STATISTICS, Difference, MainStatistic, paired_bootstrap


class ComparedMetric(NamedTuple):
    """One metric of both runs."""

    name: str
    a: float
    b: float
    difference: Difference
    n: int
    unit: str


def result_folders(path: str | Path) -> dict[str, Path]:
    """Benchmark -> folder of its results, from the output folder of one benchmark or of several.

    Raises:
        UserError: the folder contains no scored run, or two of one benchmark.
    """
    path = existing(path)
    folders = [path] if (path / "results.json").exists() else [p.parent for p in path.glob("*/results.json")]
    if not folders:
        raise UserError(f"{path} holds no results.json: run `unitok eval run` or `unitok eval score` first.")
    found: dict[str, Path] = {}
    for folder in sorted(folders):
        name = str(read_result(folder)["benchmark"])
        if name in found:
            raise UserError(f"{found[name]} and {folder} are both runs of {name}: give one of them.")
        found[name] = folder
    return found


def read_result(folder: str | Path) -> Record:
    """The `results.json` of one benchmark; UserError if it is not one."""
    path = Path(folder) / "results.json"
    result = read_json_as(dict, path)
    require_key(result, "benchmark", path)
    for name, metric in require_type(dict, require_key(result, "metrics", path), f"{path}, metrics").items():
        for key in ("value", "n", "interval", "unit"):
            require_key(metric, key, f"{path}, metrics, {name}")
    require_type(list, require_key(result, "problems", path), f"{path}, problems")
    return result


def compare(a: str | Path, b: str | Path) -> list[ComparedMetric]:
    """The main metric of both runs and the mean scores per group, with their differences.

    Samples are matched by id and question: two layouts of a benchmark may have them in another order.

    Raises:
        UserError: the runs differ in benchmark, split, scorer or samples, or have no score per sample.
    """
    results = [read_result(folder) for folder in (a, b)]
    # a difference of these would be compared instead of the models
    for key in ("benchmark", "split", "scorer", "statistic"):
        first, second = (result.get(key) for result in results)
        if first != second:
            raise UserError(f"{a} and {b} cannot be compared: {key} is {first!r} and {second!r}.")
    name = str(results[0].get("statistic"))
    records = [_main_records(Path(folder) / "scores.jsonl", name) for folder in (a, b)]
    try:
        records[1] = _in_order_of(records[0], records[1])
    except UserError as error:
        raise UserError(f"{a} and {b} cannot be compared: {error}") from error
    statistic, main = STATISTICS[name], results[0]["metric"]
    lines = [_compare_records(main, records, statistic, results[0]["metrics"][main]["unit"])]
    if any(abs(v - r["value"]) > 1e-6 for v, r in zip((lines[0].a, lines[0].b), results)):
        # the main metric is not a statistic of the records, e.g. FID: compare the scores per sample instead
        lines = [lines[0]._replace(name="score per sample", unit="points")]
    named = [record.get("group") or "" for record in records[0]]
    groups = list(dict.fromkeys(named))
    for group in groups if len(groups) > 1 else ():
        chosen = [[r for r, own in zip(side, named) if own == group] for side in records]
        unit = "fraction" if statistic.unit == "points" else statistic.unit
        # of F1 and of points the parts are mean scores, which their name says
        label = f"  {group}" if name in ("mean", "group mean") else f"  {group}, mean score"
        lines.append(_compare_records(label, chosen, STATISTICS["mean"], unit))
    return lines


def _main_records(path: Path, statistic: str) -> list[Record]:
    """The records that enter the main metric, in order."""
    records = [
        record
        for record in read_json_lines(path)
        if record.get("score") is not None
        and not record.get("held_out")  # scenes: held-out pairs have their own metric
        and record.get("kind") != "reconstruct"  # the ceiling
        and record.get("in_main_metric", True)
    ]
    if not records or statistic not in STATISTICS:
        raise UserError(f"{path} has no score per sample to compare (FID and similar metrics have none).")
    return records


def _in_order_of(first: Sequence[Record], second: Sequence[Record]) -> list[Record]:
    """The second records in the order of the first.

    Raises:
        UserError: the samples of the two differ.
    """
    # ids repeat (MME, SEED-Bench): with question and truth they tell samples apart
    left: dict[Any, list[Record]] = {}
    for record in second:
        left.setdefault(_sample_key(record), []).append(record)
    matched = [left[key].pop(0) if left.get(key := _sample_key(record)) else None for record in first]
    common = sum(record is not None for record in matched)
    if not common == len(first) == len(second):
        raise UserError(
            f"their samples differ: {len(first)} and {len(second)}, of which {common} have the same id, "
            "question and truth."
        )
    return [record for record in matched if record is not None]


def _sample_key(record: Record) -> tuple[str, str, str]:
    """Equal for two records of the same sample."""
    name = str(record.get("id", record["index"]))
    if "question" not in record:  # a generated image
        return name, "", ""
    question = " ".join(str(record["question"]).casefold().split())
    return name, question, str(record.get("truth"))


def _compare_records(
    name: str, records: list[list[Record]], statistic: MainStatistic, unit: str
) -> ComparedMetric:
    """Compare the statistic of two lists of records."""
    first, second = (statistic.columns(side) for side in records)
    # the unit of resampling: image, else prompt, else sample
    clusters = [record.get("cluster", record.get("owner", record["index"])) for record in records[0]]
    a, b = (float(statistic.value(side.sum(axis=0))) for side in (first, second))
    difference = paired_bootstrap(first, second, clusters, statistic.value)
    return ComparedMetric(name, a, b, difference, len(records[0]), unit)


def difference_notes(a: str | Path, b: str | Path) -> list[str]:
    """What else differs between two runs than the model, and why one is not comparable; one line each."""
    results = [read_result(folder) for folder in (a, b)]
    lines = [
        f"{side}: {result['not_comparable_reason']}"
        for side, result in zip("AB", results)
        if result.get("not_comparable_reason")
    ]
    for key in ("prompt_template", "decoding", "scoring"):
        first, second = (r[key] if isinstance(r.get(key), dict) else {key: r.get(key)} for r in results)
        lines += [
            f"{name.replace('_', ' ')} of A is {first.get(name)!r}, of B {second.get(name)!r}"
            for name in {**first, **second}
            if first.get(name) != second.get(name)
        ]
    return lines


def comparison_table(name: str, lines: list[ComparedMetric]) -> str:
    """A text table: A, B, B - A with its interval and p."""
    width = max(len(line.name) for line in lines)
    title = f"{name}: {'A':>{width - len(name) + 9}}  {'B':>9}  {'B - A':>9}  95 % interval      p"
    rows = [title, "-" * len(title)]
    for line in lines:
        scale = 100 if line.unit == "fraction" else 1
        around = ""
        if line.difference.interval is not None:
            low, high = (scale * v for v in line.difference.interval)
            around = f"[{low:+.2f}, {high:+.2f}]  p={line.difference.p:.3f}"
            around += "" if low <= 0 <= high else "  *"
        values = f"{scale * line.a:>9.2f}  {scale * line.b:>9.2f}  {scale * line.difference.value:>+9.2f}"
        rows.append(f"{line.name:<{width}}  {values}  {around}  n={line.n}")
    return "\n".join([*rows, "(* = the interval excludes zero; fractions in per cent)"])
