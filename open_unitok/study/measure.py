"""Measures one trained row of a study and writes its result; a process of its own, as models take memory.

    python -m open_unitok.study.measure '{"run_dir": ..., ...}'

Quality comes from the result files of `unitok eval run`; sizes and times are measured here, on one thread.
"""

import io
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from open_unitok.core.files import write_atomic
from open_unitok.core.text_files import parse_json, read_json, read_json_lines
from open_unitok.eval.core.harness import AnswerStore
from open_unitok.eval.core.image_files import read_sample_image
from open_unitok.eval.metrics.fid import compute_moments, frechet_distance
from open_unitok.eval.tokenizer.reconstruction import unpack_codes
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.frozen.efficientnet import MEAN, STD, EfficientNetLite0
from open_unitok.training.core.config import read_yaml

from .requirements import INSTALL_LITE0, has_lite0

TIMED_BATCH, TIMED_REPEATS = 16, 5
FEATURE_BATCH = 32
SHOWN_IMAGES = 8  # in the strip beside a result
CURVE_POINTS = 40
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
# why a column has no value, where its benchmark did not run
_NO_CODES = "n/a: not all of it is codes"
REASONS = {
    **dict.fromkeys(("retrieval", "zeroshot_category"), "n/a: it learns no captions"),
    **dict.fromkeys(("usage", "perplexity", "agreement", "bits"), _NO_CODES),
    "overlap": "n/a: it has one codebook, or no table of entries",
    "frechet": f"not run: the network is not installed ({INSTALL_LITE0})",
}
# columns of decoded images, of rows that no loss teaches pixels
DECODED = dict.fromkeys(
    ("psnr", "ssim", "emoji", "in_style", "frechet", "agreement"), "n/a: its pixel decoder is not trained"
)


def measure_row(run_dir: Path, splits: Sequence[str]) -> dict[str, Any]:
    """Columns of a trained row: {"columns": ..., "splits": {split: columns}, "images": {split: ...}, ...}."""
    model = UniTok.from_pretrained(run_dir / "model").eval()
    found: dict[str, Any] = {"columns": model_columns(model, run_dir), "splits": {}, "images": {}}
    without = {} if learns_pixels(run_dir) else DECODED
    for split in splits:
        folder = run_dir / "eval" / split
        columns, images = quality_columns(folder), per_image(folder)
        columns |= {"overlap": codebook_overlap(model, folder / "reconstruction"), "frechet": None}
        if has_lite0() and not without:
            columns["frechet"] = _frechet(folder / "reconstruction")
        found["splits"][split] = columns | dict.fromkeys(without)
        found["images"][split] = {key: scores for key, scores in images.items() if key not in without}
    known, reasons = found["columns"] | found["splits"][splits[0]], REASONS | without
    found["reasons"] = {column: reason for column, reason in reasons.items() if known.get(column) is None}
    return found | {"curve": loss_curve(run_dir)}


def learns_pixels(run_dir: Path) -> bool:
    """Whether a run has a loss on pixels."""
    losses = read_yaml(run_dir / "config.yaml")["losses"]
    return any(losses[name] > 0 for name in ("l1", "l2", "lpips"))


# ---- sizes and times ---------------------------------------------------------------------------------------


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
        "bits": tokens * per_token if per_token else None,  # a continuous tokenizer says 0
        "parameters": count_parameters(model) / 1e6,
        "step_seconds": statistics.median(batch / row["samples_per_second"] for row in rows),
    }
    with torch.inference_mode():
        latents = model.quantizer.quantise(model.encode_latents(images))
        grid = model.config.layout.grid
        columns["encode_ms"] = _milliseconds(lambda: model.quantizer.quantise(model.encode_latents(images)))
        columns["decode_ms"] = _milliseconds(lambda: model.decode_latents(latents, grid))
    return columns


def count_parameters(model: UniTok) -> int:
    """Parameters without the text tower, which rows without captions have and do not train."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("text_encoder."))


def _milliseconds(work: Any) -> float:
    """Per image, of the fastest of several calls: other load can only add time."""
    work()
    times = []
    for _ in range(TIMED_REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1000 * min(times) / TIMED_BATCH


def loss_curve(run_dir: Path) -> list[list[float]]:
    """At most `CURVE_POINTS` (step, loss) of a run."""
    path = run_dir / "metrics.jsonl"
    rows = read_json_lines(path) if path.exists() else []
    points = [[row["step"], round(row["loss"], 4)] for row in rows if np.isfinite(row.get("loss", np.nan))]
    return points[:: max(1, -(-len(points) // CURVE_POINTS))]


# ---- quality -----------------------------------------------------------------------------------------------


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
            columns[name] = [short(row[key]) for row in rows]
    return columns


def short(value: float) -> float:
    """In few characters: files of results are committed."""
    return int(value) if value == int(value) else round(float(value), 3)


def codebook_overlap(model: UniTok, folder: Path) -> float | None:
    """How redundant the sub-codebooks are: the mean over pairs of the mean squared canonical correlation
    of their entries, over the tokens of a split; 0 = uncorrelated, None with one codebook."""
    quantizer = model.quantizer
    if not quantizer.discrete or len(quantizer.code_sizes) < 2 or quantizer.code_table() is None:
        return None
    if quantizer.sums_rows:
        return None
    records = [record for record in AnswerStore(folder, "reconstruction").records() if "codes" in record]
    codes = [unpack_codes(record["codes"], *record["codebooks"]) for record in records]
    with torch.inference_mode():
        rows = quantizer.embed(torch.from_numpy(np.stack(codes).astype(np.int64)))
    books = np.array_split(rows.double().flatten(0, 1).numpy(), len(quantizer.code_sizes), axis=1)
    bases = [_basis(book) for book in books]
    return float(np.mean([((a.T @ b) ** 2).sum() / min(a.shape[1], b.shape[1])
                          for a, b in itertools.combinations(bases, 2)]))  # fmt: skip


def _basis(rows: np.ndarray) -> np.ndarray:
    """An orthonormal basis of the columns of centred rows; a constant book has one of no columns."""
    left, sizes, _ = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    return left[:, : max(1, int((sizes > 1e-8 * max(sizes[0], 1e-12)).sum()))]


def _frechet(folder: Path) -> float:
    """Distance of reconstructions and originals in the pooled features of EfficientNet-Lite0; not FID."""
    rows = _by_index(folder)
    network = EfficientNetLite0()
    sides = ([folder / row["reconstruction"] for row in rows], [Path(row["image"]) for row in rows])
    distance = frechet_distance(*(compute_moments(_features(network, files)) for files in sides))
    # the last digits of a matrix root differ between processes: two runs of a row give the same numbers
    return float(f"{distance:.6g}")


def _by_index(folder: Path) -> list[dict[str, Any]]:
    return sorted(read_json_lines(folder / "scores.jsonl"), key=lambda row: row["index"])


def _features(network: EfficientNetLite0, files: list[Path]) -> Iterator[np.ndarray]:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    for start in range(0, len(files), FEATURE_BATCH):
        images = [np.asarray(read_sample_image(file)) for file in files[start : start + FEATURE_BATCH]]
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
        with torch.inference_mode():
            yield network.pooled((pixels - mean) / std).numpy()


# ---- files -------------------------------------------------------------------------------------------------


def save_strip(files: Sequence[Path], path: Path) -> None:
    """Images side by side in one file without loss, for the page."""
    images = [read_sample_image(file) for file in files[:SHOWN_IMAGES]]
    strip = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    for number, image in enumerate(images):
        strip.paste(image, (number * image.width, 0))
    buffer = io.BytesIO()
    strip.save(buffer, "WEBP", lossless=True)
    write_atomic(path, buffer.getvalue())


def write_result(path: Path, result: dict[str, Any]) -> None:
    """A line per key; the file marks the row as finished."""
    lines = [
        f"{json.dumps(key)}: {json.dumps(v, separators=(',', ':'), allow_nan=False)}"
        for key, v in result.items()
    ]
    write_atomic(path, "{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    """Measure the row of the JSON argument and write its result file."""
    job = parse_json(sys.argv[1], "The job")
    torch.set_num_threads(1)
    run_dir, path = Path(job["run_dir"]), Path(job["result"])
    result = {**job["known"], **measure_row(run_dir, job["splits"])}
    folder = run_dir / "eval" / job["splits"][0] / "reconstruction"
    rows = _by_index(folder)[:SHOWN_IMAGES]
    if learns_pixels(run_dir):
        save_strip([folder / row["reconstruction"] for row in rows], path.with_suffix(".webp"))
    originals = path.parent.parent / "originals.webp"
    if not originals.exists():
        save_strip([Path(row["image"]) for row in rows], originals)
    write_result(path, result)


if __name__ == "__main__":
    main()
