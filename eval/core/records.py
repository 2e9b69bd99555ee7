"""Records of scores.jsonl, metrics over samples with intervals by image, and submission files."""

import json
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from open_unitok.core.files import write_atomic

from .benchmark import Metric, Record, Sample
from .bootstrap import bootstrap, mean_columns


def sample_record(
    sample: Sample,
    records: dict[int, Record],
    score: float | None,
    truth: Any,
    group: str = "",
    question: str = "",
    **more: Any,
) -> Record:
    """A record of `scores.jsonl`; `score` is None for a sample that is not scored."""
    record = records.get(sample.index, {})
    return {
        "index": sample.index, "id": sample.id, "image": record.get("file") or str(sample.image or ""),
        "cluster": cluster_of(sample), "group": group, "question": question or sample.prompt,
        "answer": None if record.get("error") else record.get("text"), "truth": truth, "score": score,
        **more, **({"error": record["error"]} if record.get("error") else {}),
    }  # fmt: skip


def cluster_of(sample: Sample) -> str:
    """The bootstrap cluster of a sample: its image, or the sample itself if it has none."""
    return sample.image.name if sample.image is not None else f"#{sample.index}"


def mean_metric(
    values: Sequence[float] | np.ndarray, clusters: Sequence[Hashable], unit: str = "fraction"
) -> Metric:
    """The mean of values with its bootstrap interval; 0 for no values."""
    values = np.asarray(values, np.float64)
    # numpy warns and returns NaN for the mean of nothing
    average = float(values.mean()) if len(values) else 0.0
    interval = bootstrap(mean_columns(values), clusters) if len(values) else None
    return Metric(average, len(values), interval, unit)


def mean_metrics_by(
    prefix: str,
    groups: Sequence[str],
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable],
    unit: str = "fraction",
) -> dict[str, Metric]:
    """`prefix/group` -> mean of the group's values, sorted by group; "" means no group."""
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        if group != "":
            members.setdefault(group, []).append(i)
    values = np.asarray(values, np.float64)
    return {
        f"{prefix}/{group}": mean_metric(values[members[group]], [clusters[i] for i in members[group]], unit)
        for group in sorted(members)
    }


def submittable(samples: Sequence[Sample]) -> list[Sample]:
    """The samples with a readable id, which a submission file must list."""
    # see malformed_sample: an id "#7" is ours, not the benchmark's
    return [s for s in samples if not (s.malformed and str(s.id).startswith("#"))]


def write_submission(folder: Path, name: str, content: Any) -> Path:
    """Write `folder/submission/name`: a list to .jsonl, text to .txt or .tsv, anything else as JSON."""
    path = folder / "submission" / name
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    else:
        text = content if path.suffix in (".txt", ".tsv") else json.dumps(content, ensure_ascii=False)
    write_atomic(path, text)
    return path


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean, 0 for no values."""
    return sum(values) / len(values) if values else 0.0


def mean_by(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Group -> mean of its values, sorted by group."""
    groups: dict[str, list[float]] = defaultdict(list)
    for group, value in pairs:
        groups[group].append(value)
    return {group: mean(groups[group]) for group in sorted(groups)}
