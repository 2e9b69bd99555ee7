"""Numbers of questions: a row per sample, shares with intervals by image, submission files."""

import json
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from open_unitok.core.files import write_atomic

from .bootstrap import bootstrap, mean_columns
from .harness import Metric, Record, Sample


def cluster_of(sample: Sample) -> str:
    """What a sample shares with others: its image; without one it stands alone."""
    return sample.image.name if sample.image is not None else f"#{sample.index}"


def submittable(samples: Sequence[Sample]) -> list[Sample]:
    """Those that a submission can name: all but malformed ones whose id cannot be read."""
    return [s for s in samples if not (s.malformed and str(s.id).startswith("#"))]


def sample_record(
    sample: Sample,
    rows: dict[int, Record],
    score: float | None,
    truth: Any,
    group: str = "",
    question: str = "",
    **more: Any,
) -> Record:
    """A line of `scores.jsonl`; `score` is None for a sample that does not count."""
    row = rows.get(sample.index, {})
    return {
        "index": sample.index, "id": sample.id, "image": row.get("file") or str(sample.image or ""),
        "cluster": cluster_of(sample), "group": group, "question": question or sample.prompt,
        "answer": None if row.get("error") else row.get("text"), "truth": truth, "score": score,
        **more, **({"error": row["error"]} if row.get("error") else {}),
    }  # fmt: skip


def mean_metric(
    values: Sequence[float] | np.ndarray, clusters: Sequence[Hashable], unit: str = "share"
) -> Metric:
    """The mean of values with its interval; 0 of nothing."""
    values = np.asarray(values, np.float64)
    mean = float(values.mean()) if len(values) else 0.0
    return Metric(mean, len(values), bootstrap(mean_columns(values), clusters) if len(values) else None, unit)


def mean_metrics_by(
    prefix: str,
    groups: Sequence[str],
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable],
    unit: str = "share",
) -> dict[str, Metric]:
    """`prefix/group` -> the mean of its values, groups in alphabetical order; "" is no group."""
    places: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        if group != "":
            places.setdefault(group, []).append(i)
    values = np.asarray(values, np.float64)
    return {
        f"{prefix}/{group}": mean_metric(values[places[group]], [clusters[i] for i in places[group]], unit)
        for group in sorted(places)
    }


def write_submission(folder: Path, name: str, content: Any) -> Path:
    """`folder/submission/name`: a list of rows for .jsonl, any text for .txt, JSON for all others."""
    path = folder / "submission" / name
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    else:
        text = content if path.suffix in (".txt", ".tsv") else json.dumps(content, ensure_ascii=False)
    write_atomic(path, text)
    return path


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean, 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def mean_by(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Group -> mean of its values, groups in alphabetical order."""
    groups: dict[str, list[float]] = defaultdict(list)
    for group, value in pairs:
        groups[group].append(value)
    return {group: mean(groups[group]) for group in sorted(groups)}
