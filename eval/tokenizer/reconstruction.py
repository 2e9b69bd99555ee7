"""Reconstruction: what comes back when an image is encoded and decoded, image by image and as a whole.

B images, N visual tokens, K sub-codebooks.
"""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing, sha256

from ..core import tar_images
from ..core.annotations import read_image
from ..core.bootstrap import bootstrap, mean_columns
from ..core.crops import find_crop
from ..core.harness import Metric, Record, Sample, Scored, Scoring, Settings, Task
from ..core.image_files import open_images, save_image
from ..core.imagenet import SUFFIXES
from ..core.judge_pass import judge_findings, read_judge_pass, run_judge_pass
from ..metrics import image_quality, inception_features

LPIPS_BATCH = 16


def load_reconstruction(data: Path, settings: Settings) -> Task:
    """Every image of `data/test/images`, or of `data` and its folders, or of its tars, by name."""
    folder = next((f for f in (data / "test" / "images", data / "images") if f.is_dir()), existing(data))
    files = sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES)
    if not files:
        files = [p for tar in sorted(folder.rglob("*.tar")) for p in tar_images.members(tar, SUFFIXES)]
    files = files[: settings.limit]
    if not files:
        raise UserError(f"{folder} holds no images ({', '.join(SUFFIXES)}), nor tars with images.")
    samples = [Sample(i, str(p.relative_to(folder)), "", p, "reconstruct") for i, p in enumerate(files)]
    crop = settings.crop or "bicubic"
    find_crop(crop)
    return Task(samples, {"crop": crop}, {"split": str(folder), "preprocessing": f"{crop} crop"})


def reconstruct(model: Any, batch: list[Sample], out: Path, task: Task) -> list[Record]:
    """Write each image's copy below `out/images` and note its codes, and how many the copy keeps."""
    rows, images = open_images(batch)
    if images:
        copies = model.reconstruct(list(images.values()), reencode=True)
        for place, (i, copy, codes) in enumerate(zip(images, copies.decoded, copies.codes)):
            file = f"images/{batch[i].index:06d}.png"
            save_image(copy, out / file)
            books = [codes.shape[1], copies.codebook_size]
            rows[i] = {"file": file, "codes": pack(codes), "codebooks": books}
            if copies.reencoded is not None:
                rows[i]["kept"] = (copies.reencoded[place] == codes).mean(axis=0).tolist()
    return rows


def pack(codes: np.ndarray) -> str:
    """(N, K) codes below 65,536 -> text."""
    return base64.b64encode(codes.astype("<u2").tobytes()).decode()


def unpack(text: str, sub_codebooks: int) -> np.ndarray:
    """The inverse of `pack`, (N, K)."""
    return np.frombuffer(base64.b64decode(text), "<u2").reshape(-1, sub_codebooks)


def copied(task: Task, rows: dict[int, Record]) -> list[Sample]:
    """The samples that have a copy."""
    return [s for s in task.samples if s.index in rows and not rows[s.index].get("error")]


def originals_of(batch: list[Sample], size: int, crop: str) -> np.ndarray:
    """The images as the tokenizer saw them, uint8 (B, size, size, 3)."""
    import torch

    from open_unitok.tokenizer.images import to_uint8

    cut = find_crop(crop)
    pixels = torch.stack([cut(read_image(s.image), size) for s in batch])
    return to_uint8(pixels).permute(0, 2, 3, 1).numpy()


def in_batches(items: list, size: int) -> Iterator[list]:
    """Consecutive pieces of at most `size`."""
    return (items[i : i + size] for i in range(0, len(items), size))


# ---------------------------------------------------------------------------------------------------- looking


def look_at_copies(
    task: Task, rows: dict[int, Record], out: Path, scoring: Scoring, device: str, quiet: bool
) -> None:
    """Inception features of copies and originals, and LPIPS, for whichever a weight file is given."""
    good, crop = copied(task, rows), task.truth["crop"]

    def copy_of(i: int) -> np.ndarray:
        return np.asarray(read_image(out / rows[good[i].index]["file"]))

    def original_of(i: int) -> np.ndarray:
        return originals_of([good[i]], copy_of(i).shape[0], crop)[0]

    if scoring.inception_weights and good:
        lineage = inception_features.lineage_of(scoring, "torch-fidelity")
        names = [f"{s.id} {crop} {s.index}" for s in good]
        copies = [f"{rows[s.index]['codes']}" for s in good]  # another copy has other codes
        sets = [inception_features.ImageSet("originals", names, original_of)]
        sets.append(inception_features.ImageSet("copies", copies, copy_of))
        inception_features.extract(out, lineage, scoring.inception_weights, sets, device, quiet)
    if scoring.lpips_weights:
        look_lpips(task, rows, out, scoring.lpips_weights, device, quiet)


def look_lpips(
    task: Task, rows: dict[int, Record], out: Path, weights: str, device: str, quiet: bool
) -> None:
    """LPIPS of every copy."""
    import torch

    from open_unitok.tokenizer.frozen.lpips import LPIPS, LPIPS_FILE
    from open_unitok.tokenizer.loading import HELPER_HUB_ID, find_weights

    file = find_weights(weights, (LPIPS_FILE,), "LPIPS", f"https://huggingface.co/{HELPER_HUB_ID}")
    net = LPIPS.from_file(file).to(device)

    def work(batch: list[Sample], pictures: list[Any]) -> list[Record]:
        copies = np.stack([np.asarray(picture) for picture in pictures])
        both = (originals_of(batch, copies.shape[1], task.truth["crop"]), copies)
        with torch.inference_mode():
            a, b = (torch.from_numpy(x).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1 for x in both)
            return [{"lpips": value} for value in net(a, b).tolist()]

    about = {"network": "VGG16, published linear heads", "fingerprint": sha256(file)}
    run_judge_pass(out, "lpips", about, copied(task, rows), rows, work, LPIPS_BATCH, quiet)


# ---------------------------------------------------------------------------------------------------- scoring


def score_reconstruction(
    task: Task, rows: dict[int, Record], folder: Path, run: dict[str, Any], scoring: Scoring
) -> Scored:
    """rFID first where there is one, PSNR, SSIM and LPIPS per image, use of the codebooks, codes kept."""
    mode, good = scoring.scorer, copied(task, rows)
    if not good:
        raise UserError(f"{folder}: not one image could be read, so there is nothing to score.")
    k, v = rows[good[0].index]["codebooks"]
    use = image_quality.CodebookUsage(k, v)
    psnr, ssim = [], []
    for batch in in_batches(good, 64):
        copies = [np.asarray(read_image(folder / rows[s.index]["file"])) for s in batch]
        originals = originals_of(batch, copies[0].shape[0], task.truth["crop"])
        psnr += image_quality.psnr(originals, np.stack(copies)).tolist()
        ssim += image_quality.ssim(originals, np.stack(copies), mode).tolist()
        use.add(np.concatenate([unpack(rows[s.index]["codes"], k) for s in batch]))
    used, perplexity = use.usage(), use.perplexity()
    result = {
        "psnr": Metric(float(np.mean(psnr)), len(good), bootstrap(mean_columns(psnr)), "dB"),
        "ssim": Metric(float(np.mean(ssim)), len(good), bootstrap(mean_columns(ssim)), "ssim"),
    }
    details = {
        "ssim_mode": mode,
        "codebook_size": v,
        "usage": used.tolist(),
        "perplexity": perplexity.tolist(),
        "tokens": int(use.counts.sum() // k),
    }
    problems = add_lpips(result, folder, good)
    result["codebook_usage_min"] = Metric(float(used.min()), len(good))
    result["codebook_perplexity_mean"] = Metric(float(perplexity.mean()), len(good), None, "entries")
    kept = np.array([rows[s.index]["kept"] for s in good if "kept" in rows[s.index]])
    if len(kept):
        share = kept.mean(axis=1)
        result["codes_kept"] = Metric(float(share.mean()), len(kept), bootstrap(mean_columns(share)))
        details["codes_kept"] = kept.mean(axis=0).tolist()
    problems += add_rfid(
        result, details, folder, inception_features.lineage_of(scoring, "torch-fidelity"), len(good)
    )
    return Scored(result, details, [
        {
            "index": s.index, "image": str(s.image), "reconstruction": rows[s.index]["file"],
            "psnr": p, "ssim": q, "score": p,
        }
        for s, p, q in zip(good, psnr, ssim)
    ], problems=problems)  # fmt: skip


def add_lpips(result: dict[str, Metric], folder: Path, good: list[Sample]) -> list[str]:
    """Add LPIPS where it was computed; what has to be said."""
    found = read_judge_pass(folder, "lpips", good)
    if found is None:
        return []
    seen, problems = judge_findings(found[0])
    values = [row["lpips"] for row in seen.values()]
    if values:
        result["lpips"] = Metric(
            float(np.mean(values)), len(values), bootstrap(mean_columns(values)), "lpips"
        )
    missing = len(good) - len(found[0].records)
    return problems + [f"{missing} images have no LPIPS yet; run again with --lpips-weights"] * (missing > 0)


def add_rfid(
    result: dict[str, Metric], details: dict[str, Any], folder: Path, lineage: str, n: int
) -> list[str]:
    """Add rFID and the copies' Inception Score where features were computed; what has to be said."""
    copies, originals = (inception_features.read(folder, lineage, what) for what in ("copies", "originals"))
    if copies is None or originals is None:
        return []
    if min(copies.n, originals.n) < n:
        return [f"only {min(copies.n, originals.n)} of {n} images have features, so no rFID: run again"]
    if n < 2:
        return ["FID needs two images"]
    reference = (originals.moments(), "the originals, cropped as the tokenizer saw them")
    found = inception_features.distances(folder, lineage, copies, reference, "r", originals)
    result |= found.metrics
    details["fid"] = found.details
    return found.problems
