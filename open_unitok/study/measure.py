"""Measures one trained row of a study and writes its result; a process of its own, as models take memory.

    python -m open_unitok.study.measure '{"run_dir": ..., ...}'

Quality comes from the result files of `unitok eval run`; sizes and times are measured here, on one thread.
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from open_unitok.core.files import write_json
from open_unitok.core.text_files import parse_json, read_json, read_json_lines
from open_unitok.eval.core.image_files import read_sample_image
from open_unitok.eval.metrics.fid import compute_moments, frechet_distance
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.frozen.efficientnet import MEAN as EFFICIENTNET_MEAN
from open_unitok.tokenizer.frozen.efficientnet import STD as EFFICIENTNET_STD
from open_unitok.tokenizer.frozen.efficientnet import EfficientNetLite0
from open_unitok.training.core.config import read_yaml

TIMED_BATCH, TIMED_REPEATS = 16, 5
FEATURE_BATCH = 32
# column -> (benchmark folder, metric); n/a where a row's benchmark did not run
QUALITY = {
    "psnr": ("reconstruction", "psnr"),
    "ssim": ("reconstruction", "ssim"),
    "usage": ("reconstruction", "codebook_usage_min"),
    "perplexity": ("reconstruction", "codebook_perplexity_mean"),
    "agreement": ("reconstruction", "reencode_agreement"),
    "emoji": ("emoji_reconstruction", "emoji"),
    "in_style": ("emoji_reconstruction", "emoji in its style"),
    "retrieval": ("retrieval", "image_to_text/R@1"),
    "zeroshot_category": ("category/zeroshot", None),
    "probe_category": ("category/linear_probe", None),
    "probe_style": ("style/linear_probe", None),
}
# column -> (benchmark folder, key of its per-image records): what a paired bootstrap compares
PER_IMAGE = {
    "psnr": ("reconstruction", "psnr"),
    "ssim": ("reconstruction", "ssim"),
    "emoji": ("emoji_reconstruction", "score"),
    "in_style": ("emoji_reconstruction", "in_style"),
    "retrieval": ("retrieval", "score"),
    "zeroshot_category": ("category/zeroshot", "score"),
    "probe_category": ("category/linear_probe", "score"),
    "probe_style": ("style/linear_probe", "score"),
}


def measure_row(run_dir: Path, splits: list[str]) -> dict[str, Any]:
    """Columns of a trained row: {"columns": ..., "splits": {split: columns}, "images": {split: ...}}."""
    model = UniTok.from_pretrained(run_dir / "model").eval()
    found: dict[str, Any] = {"columns": model_columns(model, run_dir), "splits": {}, "images": {}}
    for split in splits:
        folder = run_dir / "eval" / split
        found["splits"][split] = quality_columns(folder)
        found["images"][split] = per_image(folder)
        found["splits"][split]["frechet"] = _frechet(folder / "reconstruction")
    return found


def model_columns(model: UniTok, run_dir: Path) -> dict[str, Any]:
    """Tokens and bits per image, parameters in millions, and seconds per step and image."""
    quantizer, tokens = model.quantizer, model.config.num_visual_tokens
    per_token = float(np.log2(quantizer.code_sizes).sum()) if quantizer.discrete else quantizer.bits_per_token
    rows = [row for row in read_json_lines(run_dir / "metrics.jsonl") if "samples_per_second" in row]
    batch = read_yaml(run_dir / "config.yaml")["batch_size"]
    side = model.config.image_size
    images = torch.rand(TIMED_BATCH, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    columns: dict[str, Any] = {
        "tokens": tokens,
        "bits": None if per_token is None else tokens * per_token,
        "parameters": sum(p.numel() for p in model.parameters()) / 1e6,
        "step_seconds": statistics.median(batch / row["samples_per_second"] for row in rows),
    }
    with torch.inference_mode():
        if quantizer.discrete:
            codes = model.encode(images)
            columns["encode_ms"] = _milliseconds(lambda: model.encode(images))
            columns["decode_ms"] = _milliseconds(lambda: model.decode(codes))
    return columns


def _milliseconds(work: Any) -> float:
    """Per image, of the fastest of several calls: other load can only add time."""
    work()
    times = []
    for _ in range(TIMED_REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1000 * min(times) / TIMED_BATCH


def quality_columns(folder: Path) -> dict[str, Any]:
    """Column -> value of the benchmarks that ran in a split's folder."""
    columns = {}
    for name, (benchmark, metric) in QUALITY.items():
        path = folder / benchmark / "results.json"
        if path.exists():
            result = read_json(path)
            value = result["metrics"].get(metric or result["metric"])
            columns[name] = value and value["value"]
    return columns


def per_image(folder: Path) -> dict[str, list[float]]:
    """Column -> the score of each image, in the order of the split."""
    columns = {}
    for name, (benchmark, key) in PER_IMAGE.items():
        path = folder / benchmark / "scores.jsonl"
        if path.exists():
            rows = sorted(read_json_lines(path), key=lambda row: row["index"])
            columns[name] = [round(float(row[key]), 4) for row in rows]
    return columns


def _frechet(folder: Path) -> float | None:
    """Distance of reconstructions and originals in the pooled features of EfficientNet-Lite0; not FID."""
    path = folder / "scores.jsonl"
    if not path.exists():
        return None
    rows = sorted(read_json_lines(path), key=lambda row: row["index"])
    network = EfficientNetLite0()
    sides = ([folder / row["reconstruction"] for row in rows], [Path(row["image"]) for row in rows])
    moments = [compute_moments(_features(network, files)) for files in sides]
    return frechet_distance(*moments)


def _features(network: EfficientNetLite0, files: list[Path]) -> Any:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (EFFICIENTNET_MEAN, EFFICIENTNET_STD))
    for start in range(0, len(files), FEATURE_BATCH):
        images = [np.asarray(read_sample_image(file)) for file in files[start : start + FEATURE_BATCH]]
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
        with torch.inference_mode():
            yield network.pooled((pixels - mean) / std).numpy()


def main() -> None:
    """Measure the row of the JSON argument and write its result file."""
    job = parse_json(sys.argv[1], "The job")
    torch.set_num_threads(1)
    result = {**job["known"], **measure_row(Path(job["run_dir"]), job["splits"])}
    write_json(Path(job["result"]), result)


if __name__ == "__main__":
    main()
