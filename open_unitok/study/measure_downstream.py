"""Measures what was trained on the codes of one tokenizer: class-conditional images, probes, a joint MLLM.

    python -m open_unitok.study.measure_downstream '{"run_dir": ..., ...}'

All numbers come from the result files of `unitok eval run`, but for the tokenizer's sizes. Scores that a
paired bootstrap compares are stored per cluster (class, image, prompt), so that their mean is the column.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from open_unitok.core.text_files import parse_json, read_json, read_json_lines
from open_unitok.tokenizer import UniTok

from .commands import PROBED, classes_folder
from .measure import SHOWN_IMAGES, loss_curve, model_columns, save_strip, short, write_result

TEST_SPLIT = "test"
VQA_KINDS = ("existence", "count", "colour", "shape", "position", "relation")
_TOKENIZER = ("tokens", "bits", "parameters", "step_seconds", "encode_ms", "decode_ms", "psnr", "ssim")
_CLASSES = ("classes_none", "classes_best", "guidance", "classes_ceiling")
_PROBE = tuple(f"probe_{source}" for source in PROBED)
_VQA = ("vqa", *(f"vqa_{kind}" for kind in VQA_KINDS))
_GENEVAL = ("geneval", "geneval_ceiling")
COLUMNS_OF_PART = {"classes": _CLASSES, "probe": _PROBE, "joint": (*_VQA, *_GENEVAL)}


class Found:
    """Columns of a row, and the weighted scores of their clusters."""

    def __init__(self) -> None:
        self.columns: dict[str, Any] = {}
        self.clusters: dict[str, list[float]] = {}

    def add(
        self, column: str, folder: Path, metric: str, cluster: Callable[[dict], Any], group: str = ""
    ) -> None:
        """A metric of a benchmark's folder; with `group` its mean over groups of means, as GenEval's."""
        self.columns[column] = read_json(folder / "results.json")["metrics"][metric]["value"]
        rows = read_json_lines(folder / "scores.jsonl")
        rows = [r for r in rows if r.get("kind", "generate") == "generate" and not r.get("held_out")]
        self.clusters[column] = weighted_clusters(
            [r["score"] for r in rows],
            [cluster(r) for r in rows],
            [r[group] for r in rows] if group else None,
        )


def weighted_clusters(
    scores: Sequence[float], clusters: Sequence[Any], groups: Sequence[str] | None = None
) -> list[float]:
    """The scores summed per cluster, scaled so that their mean is that of the scores.

    With `groups` it is the mean over groups of the groups' means.
    """
    sizes: dict[str, int] = defaultdict(int)
    names = groups or [""] * len(scores)
    for name in names:
        sizes[name] += 1
    sums: dict[Any, float] = dict.fromkeys(clusters, 0.0)
    for score, cluster, name in zip(scores, clusters, names):
        sums[cluster] += score / (sizes[name] * len(sizes))
    return [round(len(sums) * value, 4) for value in sums.values()]


def measure_downstream(
    run_dir: Path, tokenizer: Path | None, parts: Sequence[str], guidance: Sequence[float]
) -> dict[str, Any]:
    """Columns of a row: {"columns": ..., "splits": {"test": ...}, "images": {"test": ...}, "reasons": ...}.

    Args:
        tokenizer: the folder of the row whose tokenizer this one uses, or None.
        guidance: scales, of which the best on validation images is taken.
    """
    found, reasons, columns, guided = Found(), {}, {}, []
    if tokenizer is None:
        model = UniTok.from_pretrained(run_dir / "tokenizer" / "model").eval()
        columns = model_columns(model, run_dir / "tokenizer")
        folder = run_dir / "eval" / "tokenizer" / "reconstruction"
        metrics = read_json(folder / "results.json")["metrics"]
        found.columns |= {name: metrics[name]["value"] for name in ("psnr", "ssim")}
        rows = sorted(read_json_lines(folder / "scores.jsonl"), key=lambda row: row["index"])
        found.clusters["psnr"] = [short(row["psnr"]) for row in rows]
    else:
        reasons |= dict.fromkeys(_TOKENIZER, f"n/a: the tokenizer is that of {tokenizer.name}")
    if "classes" in parts:
        guided = _add_classes(found, run_dir, guidance)
    if "probe" in parts:
        for source in PROBED:
            folder = run_dir / "eval" / f"probe_{source}" / "vqav2"
            found.add(f"probe_{source}", folder, "accuracy", lambda r: r["cluster"])
    if "joint" in parts:
        reasons |= _add_joint(found, run_dir / "eval" / "joint")
    for part, names in COLUMNS_OF_PART.items():
        if part not in parts:
            reasons |= dict.fromkeys(names, "n/a: a row of the joint MLLM alone")
    missing = {name: reason for name, reason in reasons.items() if name not in found.columns}
    curve = loss_curve(run_dir / ("joint" if "joint" in parts else "tokenizer"))
    found_rows = {
        "columns": columns,
        "splits": {TEST_SPLIT: found.columns},
        "images": {TEST_SPLIT: found.clusters},
    }
    return {**found_rows, "reasons": missing, "guided": guided, "curve": curve}


def _add_classes(found: Found, run_dir: Path, guidance: Sequence[float]) -> list[list[float]]:
    """The class-conditional columns; returns (scale, accuracy) of test images, without guidance first."""

    def accuracy(split: str, scale: float) -> float:
        folder = classes_folder(run_dir, split, scale) / "scene_classes"
        return read_json(folder / "results.json")["metrics"]["accuracy"]["value"]

    # of equal scales the smallest
    best = max(sorted(guidance), key=lambda scale: accuracy("validation", scale))
    for column, scale in (("classes_none", 1.0), ("classes_best", best)):
        folder = classes_folder(run_dir, TEST_SPLIT, scale) / "scene_classes"
        found.add(column, folder, "accuracy", lambda r: r["owner"])
    metrics = read_json(classes_folder(run_dir, TEST_SPLIT, 1.0) / "scene_classes" / "results.json")[
        "metrics"
    ]
    found.columns |= {"guidance": best, "classes_ceiling": metrics.get("ceiling", {}).get("value")}
    return [[scale, accuracy(TEST_SPLIT, scale)] for scale in (1.0, *sorted(guidance))]


def _add_joint(found: Found, folder: Path) -> dict[str, str]:
    """The columns of the joint MLLM; returns why some have no value."""
    found.add("geneval", folder / "geneval", "overall", lambda r: r["owner"], "group")
    details = read_json(folder / "geneval" / "results.json")["details"]
    found.columns["geneval_ceiling"] = details.get("ceiling_overall")
    if not (folder / "vqav2").exists():
        return dict.fromkeys(_VQA, "n/a: it learns to generate alone")
    found.add("vqa", folder / "vqav2", "accuracy", lambda r: r["cluster"])
    metrics = read_json(folder / "vqav2" / "results.json")["metrics"]
    for kind in VQA_KINDS:
        found.columns[f"vqa_{kind}"] = metrics.get(f"type/{kind}", {}).get("value")
    return {}


def main() -> None:
    """Measure the row of the JSON argument and write its result file."""
    job = parse_json(sys.argv[1], "The job")
    torch.set_num_threads(1)
    run_dir, path = Path(job["run_dir"]), Path(job["result"])
    tokenizer = Path(job["tokenizer_of"]) if job["tokenizer_of"] else None
    result = {**job["known"], **measure_downstream(run_dir, tokenizer, job["parts"], job["guidance"])}
    if "classes" in job["parts"]:
        folder = classes_folder(run_dir, TEST_SPLIT, 1.0) / "scene_classes"
        rows = [row for row in read_json_lines(folder / "scores.jsonl") if row["kind"] == "generate"]
        first = [row["file"] for row in rows if row["file"].endswith("/0000.png")]  # one per class
        step = max(1, len(first) // SHOWN_IMAGES)
        save_strip([folder / file for file in first[::step]], path.with_suffix(".webp"))
    write_result(path, result)


if __name__ == "__main__":
    main()
