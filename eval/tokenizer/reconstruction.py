"""Reconstruction: PSNR, SSIM and LPIPS per image, rFID, codebook usage and re-encode agreement.

B images, N visual tokens, K sub-codebooks, V entries.
"""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import torch

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing, sha256
from open_unitok.core.image_names import find_images
from open_unitok.tokenizer import code_dtype
from open_unitok.tokenizer.frozen.lpips import LPIPS, LPIPS_FILE
from open_unitok.tokenizer.images import to_uint8
from open_unitok.tokenizer.loading import HELPER_HUB_ID, find_weights

from ..core.benchmark import Metric, Options, Record, Sample, Scored, Task
from ..core.bootstrap import bootstrap, mean_columns
from ..core.crops import find_crop
from ..core.image_files import open_images, read_sample_image, save_image, tar_images
from ..core.image_sets import ImageSet
from ..core.judge_pass import judge_findings, read_judge_pass, run_judge_pass
from ..metrics import image_quality, inception_features

LPIPS_BATCH, SCORING_BATCH = 16, 64


def load(data: Path, settings: Options) -> Task:
    """All images of `data/test/images`, `data/images` or `data`, or of the tars there, sorted by name."""
    folder = next((f for f in (data / "test" / "images", data / "images") if f.is_dir()), existing(data))
    # sorted: sample indices must not depend on the file system
    found = find_images(folder)
    files = found.images or [p for tar in sorted(folder.rglob("*.tar")) for p in tar_images(tar)]
    note = found.note(folder)
    if not files:
        raise UserError(
            f"{folder} holds neither images (.png, .jpg, ...) nor tars with images.{note and f' {note}'}"
        )
    files = files[: settings.limit]
    samples = [Sample(i, str(p.relative_to(folder)), "", p, "reconstruct") for i, p in enumerate(files)]
    crop = settings.crop or "bicubic"
    find_crop(crop)  # raises for an unknown name before the model loads
    return Task(
        samples,
        {"crop": crop},
        {"split": str(folder), "preprocessing": f"{crop} crop"},
        [note] if note else [],
    )


def answer(model: Any, batch: list[Sample], out: Path, task: Task) -> list[Record]:
    """Save the reconstructions; record codes and their agreement with the re-encoded codes."""
    records, images = open_images(batch)
    if images:
        found = model.reconstruct(list(images.values()), reencode=True)
        for k, (i, image) in enumerate(zip(images, found.decoded)):
            file = f"images/{batch[i].index:06d}.png"
            save_image(image, out / file)
            records[i] = {"file": file}
            if found.codes is None:  # a continuous autoencoder
                records[i] |= {"bits_per_token": found.bits_per_token} if found.bits_per_token else {}
                continue
            codes, size = found.codes[k], found.codebook_size
            records[i] |= {"codes": _pack(codes, size), "codebooks": [codes.shape[1], size]}
            if found.code_sizes is not None and len(set(found.code_sizes)) > 1:
                records[i]["code_sizes"] = found.code_sizes
            # (K,) per sub-codebook: fraction of tokens whose code is unchanged
            if found.reencoded is not None:
                records[i]["agreement"] = (found.reencoded[k] == codes).mean(axis=0).tolist()
    return records


def _pack(codes: np.ndarray, codebook_size: int) -> str:
    """(N, K) codes -> base64 text."""
    return base64.b64encode(codes.astype(_dtype(codebook_size)).tobytes()).decode()


def unpack_codes(text: str, sub_codebooks: int, codebook_size: int) -> np.ndarray:
    """The inverse of `_pack`: base64 text -> (N, K) codes."""
    return np.frombuffer(base64.b64decode(text), _dtype(codebook_size)).reshape(-1, sub_codebooks)


def _dtype(codebook_size: int) -> np.dtype:
    """The little-endian dtype in which codes are recorded."""
    return np.dtype(code_dtype([codebook_size])).newbyteorder("<")


def _reconstructed(task: Task, records: dict[int, Record]) -> list[Sample]:
    """The samples that have a reconstruction."""
    return [s for s in task.samples if s.index in records and not records[s.index].get("error")]


def _originals(batch: list[Sample], shape: tuple[int, ...], crop: str) -> np.ndarray:
    """The images as the tokenizer reads them, uint8 (B, H, W, 3) of `shape` = (H, W)."""
    crop_image = find_crop(crop)
    # the same crop as in the model: FID must not measure the preprocessing
    pixels = torch.stack([crop_image(read_sample_image(s.image), shape) for s in batch])
    return to_uint8(pixels).permute(0, 2, 3, 1).numpy()


# ---------------------------------------------------------------------------------------------- judge passes


def judge(
    task: Task, records: dict[int, Record], out: Path, scoring: Options, device: str, quiet: bool
) -> None:
    """Inception features of originals and reconstructions, and LPIPS, if their weight files are given."""
    good, crop = _reconstructed(task, records), task.truth["crop"]

    # images are read one at a time: a set may not fit into memory
    def load_decoded(i: int) -> np.ndarray:
        return np.asarray(read_sample_image(out / records[good[i].index]["file"]))

    def load_original(i: int) -> np.ndarray:
        return _originals([good[i]], load_decoded(i).shape[:2], crop)[0]

    if scoring.inception_weights and good:
        variant = inception_features.choose_variant(scoring, "torch-fidelity")
        # names are cache keys: the crop changes the originals
        names = [f"{s.id} {crop} {s.index}" for s in good]
        # a reconstruction is determined by its codes
        codes = [records[s.index].get("codes") or sha256(out / records[s.index]["file"]) for s in good]
        sets = [ImageSet("originals", names, load_original)]
        sets.append(ImageSet("reconstructions", codes, load_decoded))
        inception_features.extract_inception_features(
            out, variant, scoring.inception_weights, sets, device, quiet
        )
    if scoring.lpips_weights:
        _run_lpips_pass(task, records, out, scoring.lpips_weights, device, quiet)


def _run_lpips_pass(
    task: Task, records: dict[int, Record], out: Path, weights: str, device: str, quiet: bool
) -> None:
    """LPIPS of every reconstruction."""
    file = find_weights(weights, (LPIPS_FILE,), "LPIPS", f"https://huggingface.co/{HELPER_HUB_ID}")
    net = LPIPS.from_file(file).to(device)

    def measure(batch: list[Sample], images: list[Any]) -> list[Record]:
        # measured on the saved 8-bit images, as in published tables
        decoded = np.stack([np.asarray(image) for image in images])
        both = (_originals(batch, decoded.shape[1:3], task.truth["crop"]), decoded)
        with torch.inference_mode():
            a, b = (torch.from_numpy(x).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1 for x in both)
            return [{"lpips": value} for value in net(a, b).tolist()]

    about = {"network": "VGG16, published linear heads", "fingerprint": sha256(file)}
    run_judge_pass(out, "lpips", about, _reconstructed(task, records), records, measure, LPIPS_BATCH, quiet)


# ---------------------------------------------------------------------------------------------------- scoring


def score(
    task: Task, records: dict[int, Record], folder: Path, run: dict[str, Any], scoring: Options
) -> Scored:
    """PSNR, SSIM and codebook usage; LPIPS, rFID and re-encode agreement if they were computed."""
    good = _reconstructed(task, records)
    if not good:
        raise UserError(f"{folder}: no image could be read, so there is nothing to score.")
    # the first record is enough: all images of a run have the same tokenizer
    discrete = "codes" in records[good[0].index]
    psnr, ssim = [], []
    for start in range(0, len(good), SCORING_BATCH):
        batch = good[start : start + SCORING_BATCH]
        decoded = np.stack([np.asarray(read_sample_image(folder / records[s.index]["file"])) for s in batch])
        originals = _originals(batch, decoded.shape[1:3], task.truth["crop"])
        psnr += image_quality.psnr(originals, decoded).tolist()
        ssim += image_quality.ssim(originals, decoded, scoring.scorer).tolist()
    metrics = {"psnr": _image_mean(psnr, "dB"), "ssim": _image_mean(ssim, "ssim")}
    details: dict[str, Any] = {"ssim_mode": scoring.scorer}
    problems = _add_lpips(metrics, folder, good)
    if discrete:
        _add_usage(metrics, details, records, good)
    elif bits := records[good[0].index].get("bits_per_token"):  # continuous numbers beside codes
        metrics["bits_per_token"] = Metric(bits, len(good), None, "bits")
    agreement = [records[s.index]["agreement"] for s in good if "agreement" in records[s.index]]
    if agreement:
        metrics["reencode_agreement"] = _image_mean(np.mean(agreement, axis=1), "fraction")
        details["reencode_agreement"] = np.mean(agreement, axis=0).tolist()
    variant = inception_features.choose_variant(scoring, "torch-fidelity")
    problems += _add_rfid(metrics, details, folder, variant, len(good))
    return Scored(metrics, details, [
        {
            "index": s.index, "image": str(s.image), "reconstruction": records[s.index]["file"],
            "psnr": p, "ssim": q, "score": p,
        }
        for s, p, q in zip(good, psnr, ssim)
    ], problems=problems)  # fmt: skip


def _add_usage(
    metrics: dict[str, Metric], details: dict[str, Any], records: dict[int, Record], good: list[Sample]
) -> None:
    """Add usage and perplexity of the sub-codebooks."""
    k, v = records[good[0].index]["codebooks"]
    sizes = records[good[0].index].get("code_sizes", v)
    counter = image_quality.CodebookUsage(k, sizes)
    for start in range(0, len(good), SCORING_BATCH):
        batch = good[start : start + SCORING_BATCH]
        counter.add(np.concatenate([unpack_codes(records[s.index]["codes"], k, v) for s in batch]))
    usage, perplexity = counter.usage(), counter.perplexity()
    details |= {
        "codebook_size": v,
        "usage": usage.tolist(),
        "perplexity": perplexity.tolist(),
        "tokens": int(counter.counts.sum() // k),
    }
    if isinstance(sizes, list):
        details["code_sizes"] = sizes
    # the minimum over sub-codebooks: a mean would hide a collapsed one
    metrics["codebook_usage_min"] = Metric(float(usage.min()), len(good))
    metrics["codebook_perplexity_mean"] = Metric(float(perplexity.mean()), len(good), None, "entries")


def _image_mean(values: Any, unit: str) -> Metric:
    """The mean over images with its bootstrap interval."""
    return Metric(float(np.mean(values)), len(values), bootstrap(mean_columns(values)), unit)


def _add_lpips(metrics: dict[str, Metric], folder: Path, good: list[Sample]) -> list[str]:
    """Add LPIPS if it was computed; returns warnings."""
    found = read_judge_pass(folder, "lpips", good)
    if found is None:
        return []
    judged, problems = judge_findings(found[0])
    values = [record["lpips"] for record in judged.values()]
    if values:
        metrics["lpips"] = _image_mean(values, "lpips")
    missing = len(good) - len(found[0].records)
    return problems + [f"{missing} images have no LPIPS yet; run again with --lpips-weights"] * (missing > 0)


def _add_rfid(
    metrics: dict[str, Metric], details: dict[str, Any], folder: Path, variant: str, n: int
) -> list[str]:
    """Add rFID and the Inception Score of the reconstructions if features exist; returns warnings."""
    decoded, originals = (
        inception_features.read_inception_features(folder, variant, role)
        for role in ("reconstructions", "originals")
    )
    if decoded is None or originals is None:
        return []
    # a killed judge pass: rFID of a part of the images would look like a result
    if min(decoded.n, originals.n) < n:
        return [f"only {min(decoded.n, originals.n)} of {n} images have features, so no rFID: run again"]
    if n < 2:
        return ["FID needs two images"]
    reference = (originals.moments(), "the originals, cropped as the tokenizer reads them")
    found = inception_features.feature_distances(folder, variant, decoded, reference, "r", originals)
    metrics |= found.metrics
    details["fid"] = found.details
    return found.problems
