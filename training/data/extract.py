"""Image shards to code shards, so that the MLLM trains without the visual tokenizer.

Sample KEY of a tar is `KEY.jpg` (png, webp, bmp), or `KEY.0.jpg`, `KEY.1.jpg`, ..., next to `KEY.json` or
`KEY.txt` (a caption); "images" in the .json says how many images there must be, 0 is allowed.

With features (`FeatureSource`) every sample also has `KEY.features.npy` in float16.

Input tar i becomes codes-00000i.tar (`KEY.codes.npy` and `KEY.json`) with its own codes-00000i.json, which is
written last and marks the tar as complete: a rerun skips it. `codes.json` lists all tars; the process that
finds the last one complete writes it. Under torchrun each process takes every n-th tar; processes do not
communicate, but must see the same files.

N visual tokens per image, K sub-codebooks, B images per batch.
"""

import io
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from open_unitok.core import distributed
from open_unitok.core.codes import code_dtype
from open_unitok.core.errors import UserError
from open_unitok.core.files import sha256, write_atomic, write_json
from open_unitok.core.text_files import read_json
from open_unitok.mllm.features import FeatureSource
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.image_modes import WAS_TRANSPARENT
from open_unitok.tokenizer.images import load_image, ten_crops, to_pixels

from .captions import with_captions
from .code_shards import CODE_SIZES, CODES_FORMAT, CODES_MANIFEST, FEATURES, FeatureFacts
from .convert import conversion_root
from .records import check_facts, find_label, unused_key, with_label
from .tar_files import STDIN, StreamedTar, is_stream, shown, source_name, tar_writer, write_sample
from .tar_index import (
    MIN_SEEN_FOR_BAD_SHARE,
    BadSample,
    TarSample,
    describe_notes,
    image_members,
    scan_tar,
)

VERIFIED_IMAGES = 8  # per tar: their codes are decoded and compared with the images
LOW_PSNR = 15.0  # dB: below, a reconstruction shows little of the image
NUM_CROPS = 10  # of an image, with --ten-crop
MAX_COUNTED_TARS = 1000  # the total of the progress bar needs the headers of every tar


class ExtractOptions(NamedTuple):
    """Settings that the codes of a tar depend on, and how to compute them."""

    fingerprint: str  # of the visual tokenizer
    layout: dict[str, int]  # its TokenLayout
    mode: str
    dtype: str
    batch_size: int
    workers: int
    max_bad_share: float
    captions: str = "all"  # a value of CAPTION_CHOICES
    features: FeatureFacts | None = None
    ten_crop: float | None = None  # ten crops of every image, of one that is scaled by this much more


_Encoded = tuple[np.ndarray, np.ndarray | None]  # codes (N, K) and features (M, F) of an image


class LoadedSample(NamedTuple):
    """A sample with its images: mostly one, several in conversations and documents, or none."""

    key: str
    file: str  # name of the first image
    images: list[torch.Tensor]  # each (3, H, W)
    info: dict[str, Any]
    transparent: int  # images that were composited on a background
    reshaped: int  # images of another aspect ratio than the tokenizer's, which are cropped or padded
    tower_images: list[torch.Tensor]  # the images as another vision tower reads them


def extract_codes(
    unitok: UniTok,
    tars: list[str],
    out: Path,
    options: ExtractOptions,
    quiet: bool = False,
    source: FeatureSource | None = None,
) -> dict[str, Any] | None:
    """Write this rank's tars; returns the contents of codes.json if the tars of all ranks exist, else None.

    Args:
        source: of the features that `options.features` describe.

    Raises:
        UserError: `out` is a file, or holds codes of other images or of another tokenizer; too many
            images are unreadable.
    """
    if len(tars) > 1 and any(tar in STDIN for tar in tars):
        raise UserError("--data: stdin cannot be mixed with other sources.")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out is {out}, which is a file: give a folder.")
    for number, tar in enumerate(tars):
        _completed(out, number, tar, options)  # rejects an `out` of other origin before the first batch
    # every n-th tar, as tars of a data set are of similar size
    mine = [
        n
        for n in range(distributed.rank(), len(tars), distributed.world_size())
        if not _completed(out, n, tars[n], options)
    ]
    counted = len(mine) <= MAX_COUNTED_TARS and not any(is_stream(tars[n]) for n in mine)
    total = sum(len(scan_tar(tars[n]).samples) for n in mine) if counted else None
    shown = {"desc": "codes", "unit": " images", "file": sys.stderr, "mininterval": 1.0}
    with torch.no_grad(), tqdm(total=total, disable=quiet or not mine, **shown) as bar:
        for number in mine:
            _extract_tar(unitok, tars[number], out / _tar_name(number), options, bar.update, source)
    facts = [_completed(out, number, tar, options) for number, tar in enumerate(tars)]
    complete = [fact for fact in facts if fact]
    return _write_manifest(unitok, out, complete, options) if len(complete) == len(tars) else None


def stored_dtype(unitok: UniTok) -> np.dtype:
    """The integer type of this tokenizer's codes on disk."""
    return code_dtype(unitok.quantizer.code_sizes)


def _tar_name(number: int) -> str:
    return f"codes-{number:06d}.tar"


def _completed(out: Path, number: int, tar: str, options: ExtractOptions) -> dict[str, Any] | None:
    """The description of an output tar that is complete, else None; UserError if it is of other origin."""
    path = (out / _tar_name(number)).with_suffix(".json")
    if not (path.exists() and path.with_suffix(".tar").exists()):
        return None
    kinds = {"samples": int, "broken": int, "checked": int, "error": int | float, "sha256": str}
    facts = check_facts(path, read_json(path), kinds, "delete it and run the same command again")
    expected = {FEATURES: None, **_origin(tar, options)}
    # descriptions from before token layouts, choices of captions, features and crops do not have one
    facts = {"layout": options.layout, "captions": "all", FEATURES: None, "ten_crop": None, **facts}
    differing = [name for name, value in expected.items() if facts.get(name) != value]
    if differing:
        shown = ", ".join(
            f"{name} {str(facts.get(name))[:16]}, now {str(expected[name])[:16]}" for name in differing
        )
        raise UserError(
            f"{out} holds codes of another extraction ({shown}): choose another --out, or delete it."
        )
    return facts


def _origin(tar: str, options: ExtractOptions) -> dict[str, Any]:
    local = Path(tar).is_file()
    return {
        "source": Path(tar).name if local else source_name(tar),
        "source_bytes": Path(tar).stat().st_size if local else None,
        "tokenizer": options.fingerprint,
        "mode": options.mode,
        "dtype": options.dtype,
        "layout": options.layout,
        "captions": options.captions,
        **({FEATURES: options.features._asdict()} if options.features else {}),
        "ten_crop": options.ten_crop,
    }


def _extract_tar(
    unitok: UniTok,
    tar: str,
    target: Path,
    options: ExtractOptions,
    progress: Callable[[int], Any],
    source: FeatureSource | None,
) -> None:
    """One tar of images to one tar of codes, then its description."""
    images = StreamedTar(tar) if is_stream(tar) else scan_tar(tar)
    if images.problem:
        raise _broken(tar, images.problem)
    if images.notes:  # they may explain why samples are unreadable
        tqdm.write(f"codes: {shown(tar)}: {describe_notes(images.notes)}", file=sys.stderr)
    records = images if isinstance(images, StreamedTar) else images.samples
    bad: list[str] = []
    buffer, first = io.BytesIO(), []
    counts, keys = Counter(samples=0, images=0, oblong=0, transparent=0, labelled=0), set()
    highest = -1  # label
    with tar_writer(buffer) as writer:
        for batch in _batches(records, unitok.config.image_shape, options, bad, progress, source):
            # the images of all samples as one list: a sample has any number of them
            pixels = [image for sample in batch for image in sample.images]
            tower_pixels = [image for sample in batch for image in sample.tower_images]
            encoded = iter(_encode(unitok, pixels, tower_pixels, options.batch_size, source))
            for sample in batch:
                # without dots, which end a key
                key = unused_key(sample.key.replace(".", "_"), sample.file, keys)
                if (label := find_label(sample.info)) is not None:
                    highest = max(highest, label)
                    counts["labelled"] += 1
                members = _code_members(sample, [next(encoded) for _ in sample.images], unitok, options)
                write_sample(writer, key, members)
            # kept to verify the written tar
            first += pixels[: VERIFIED_IMAGES - len(first)]
            counts.update(samples=len(batch), images=len(pixels))
            counts.update(oblong=sum(sample.reshaped for sample in batch))
            counts.update(transparent=sum(sample.transparent for sample in batch))
    if images.problem:  # of a stream, known once it has been read
        raise _broken(tar, images.problem)
    if images.notes and isinstance(images, StreamedTar):
        tqdm.write(f"codes: {shown(tar)}: {describe_notes(images.notes)}", file=sys.stderr)
    if not counts["samples"]:
        raise UserError(f"{shown(tar)} holds no readable image ({bad[-1] if bad else 'it is empty'}).")
    # the whole tar in memory: codes are small, and a killed process leaves no partial file
    write_atomic(target, buffer.getvalue())
    error = _verify(target, counts["samples"], unitok, first, options)
    left_out = {"broken": len(bad), "notes": {reason: count for reason, (count, _) in images.notes.items()}}
    left_out |= {"image_root": conversion_root(Path(tar).parent)} if Path(tar).is_file() else {}
    left_out["highest_label"] = highest
    checked = {"checked": len(first), "error": error, "sha256": sha256(target)}
    write_json(target.with_suffix(".json"), {**_origin(tar, options), **counts, **left_out, **checked})


def _broken(tar: str, problem: str) -> UserError:
    return UserError(f"{shown(tar)} is broken: {problem}. Repair it, or leave it out of --data.")


def _encode(
    unitok: UniTok,
    pixels: list[torch.Tensor],
    tower_pixels: list[torch.Tensor],
    batch_size: int,
    source: FeatureSource | None,
) -> list[_Encoded]:
    """The codes (N, K) and features (M, F) of each image, in the dtypes that are stored.

    Raises:
        UserError: a feature is too large for float16.
    """
    found: list[_Encoded] = []
    for start in range(0, len(pixels), batch_size):
        part = slice(start, start + batch_size)
        batch = torch.stack(pixels[part]).to(unitok.device)
        features: list[Any] = [None] * len(batch)
        if source is None:
            codes = unitok.encode(batch)
        else:
            codes, values = source.encode(batch, torch.stack(tower_pixels[part]) if tower_pixels else None)
            if not bool(values.isfinite().all()):
                raise UserError(
                    f"--features {source.options.source}: a feature is too large for float16, in which they "
                    "are stored: choose another source."
                )
            features = list(values.cpu().numpy())
        found += zip(codes.cpu().numpy().astype(stored_dtype(unitok)), features)
    return found


def _batches(
    records: Iterable[TarSample],
    shape: tuple[int, int],
    options: ExtractOptions,
    bad: list[str],
    progress: Callable[[int], Any],
    source: FeatureSource | None,
) -> Iterator[list[LoadedSample]]:
    """Batches of readable samples; unreadable ones are added to `bad`, too many raise UserError."""

    def load(record: TarSample) -> LoadedSample | str:
        try:
            return _load(record, shape, options, source)
        except (BadSample, UserError) as error:
            return f"{shown(record.tar)}: {record.key}: {error}"

    # threads suffice: Pillow releases the GIL while it decodes and resizes
    pool = ThreadPoolExecutor(options.workers) if options.workers else None
    remaining = iter(records)
    # the samples of a stream are counted while they come
    total, seen = len(records) if isinstance(records, list) else 0, 0
    try:
        while group := list(islice(remaining, options.batch_size)):
            loaded = list(pool.map(load, group) if pool else map(load, group))
            seen += len(group)
            for text in (item for item in loaded if isinstance(item, str)):
                bad.append(text)
                tqdm.write(f"codes: skipped {text}", file=sys.stderr)
            if total or seen >= MIN_SEEN_FOR_BAD_SHARE:
                _check_bad_share(bad, max(seen, total), options)
            readable = [item for item in loaded if isinstance(item, LoadedSample)]
            if readable:
                yield readable
            progress(len(group))
        _check_bad_share(bad, seen, options)
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


def _check_bad_share(bad: list[str], seen: int, options: ExtractOptions) -> None:
    # a single one is allowed: one image of a small tar may exceed the share
    if len(bad) > max(1, options.max_bad_share * seen):
        raise UserError(
            f"{len(bad)} of {seen} images are unreadable, more than --max-bad-share "
            f"{options.max_bad_share:g} allows; the last: {bad[-1]}"
        )


def _load(
    record: TarSample, shape: tuple[int, int], options: ExtractOptions, source: FeatureSource | None
) -> LoadedSample:
    members, info = image_members(record)
    info = with_label(record, with_captions(record, info, options.captions))
    height, width = shape
    needed = shape if source is None else source.image_shape(shape)
    images = [load_image(record.read(member), needed=needed) for member in members]
    transparent = sum(WAS_TRANSPARENT in image.info for image in images)
    reshaped = sum(image.width * height != image.height * width for image in images)
    if len(images) == 1:
        info.setdefault("file", record.file)  # the name by which conversations look it up
    if options.ten_crop is None:
        pixels = [to_pixels(image, shape, options.mode) for image in images]
    elif len(images) == 1:
        pixels = ten_crops(images[0], height, options.ten_crop)
    else:
        raise BadSample(f"has {len(images)} images; --ten-crop takes one")
    squashed = [] if source is None else [source.tower_pixels(image) for image in images]
    tower_images = [image for image in squashed if image is not None]
    name = record.file or record.key
    return LoadedSample(record.key, name, pixels, info, transparent, reshaped, tower_images)


def _code_members(
    sample: LoadedSample, encoded: list[_Encoded], unitok: UniTok, options: ExtractOptions
) -> dict[str, bytes]:
    """A sample's codes, (N, K), or (I, N, K) for other than one image, its features, and its .json."""
    shape = (unitok.config.num_visual_tokens, unitok.config.num_codebooks)
    members = {"codes.npy": _npy([codes for codes, _ in encoded], shape, stored_dtype(unitok))}
    if options.features is not None:
        shape = (options.features.tokens, options.features.width)
        members["features.npy"] = _npy([array for _, array in encoded], shape, np.dtype(np.float16))
    info = {**sample.info, "grid": unitok.config.layout.grid} if encoded else sample.info
    text = json.dumps(info, ensure_ascii=False, separators=(",", ":"))
    return {**members, "json": text.encode()}


def _npy(arrays: list[Any], shape: tuple[int, int], dtype: np.dtype) -> bytes:
    """The .npy file of one array of `shape`, or of several or none, stacked."""
    stacked = np.stack(arrays) if arrays else np.empty((0, *shape), dtype=dtype)
    file = io.BytesIO()
    np.save(file, arrays[0] if len(arrays) == 1 else stacked, allow_pickle=False)
    return file.getvalue()


def _verify(
    path: Path, samples: int, unitok: UniTok, first: list[torch.Tensor], options: ExtractOptions
) -> float:
    """Read a written tar back and decode its first codes; returns the summed squared errors of these images.

    Raises:
        UserError: the tar does not hold the written samples.
    """
    records, problem, _ = scan_tar(str(path))
    members = {"codes.npy", "json"} | ({"features.npy"} if options.features else set())
    if problem or len(records) != samples or set(records[-1].members) != members:
        raise UserError(
            f"{path} was not written correctly ({problem or f'{len(records)} of {samples} samples'}): is the "
            "disk full?"
        )
    found: list[np.ndarray] = []
    for record in records:
        if len(found) >= len(first):
            break
        codes = np.load(io.BytesIO(record.read("codes.npy")))
        found += [codes] if codes.ndim == 2 else list(codes)
    if not first:
        return 0.0
    codes = torch.from_numpy(np.stack(found[: len(first)]).astype(np.int64)).to(unitok.device)
    reconstructions = unitok.decode(codes)
    pixels = torch.stack(first).to(unitok.device)
    # pixels are in [-1, 1]: a quarter of the squared error is that of [0, 1], as PSNR is defined
    return (reconstructions.float() - pixels).square().mean((1, 2, 3)).sum().item() / 4


def _num_images(fact: dict[str, Any]) -> int:
    """The number of images of a tar; `pictures` is the key of older tars, the oldest have one per sample."""
    return fact.get("images", fact.get("pictures", fact["samples"]))


def _write_manifest(
    unitok: UniTok, out: Path, facts: list[dict[str, Any]], options: ExtractOptions
) -> dict[str, Any]:
    """codes.json, from the descriptions of all tars."""
    notes: Counter[str] = Counter()
    for fact in facts:
        notes.update(fact.get("notes") or {})
    checked = sum(fact["checked"] for fact in facts)
    if not checked:
        raise UserError(f"{out}: no sample of --data has an image; plain text needs no codes.")
    error = sum(fact["error"] for fact in facts) / checked
    shards = [
        {"file": _tar_name(number), "samples": fact["samples"], "sha256": fact["sha256"]}
        for number, fact in enumerate(facts)
    ]
    roots = sorted({root for fact in facts if (root := fact.get("image_root"))})
    sizes = unitok.quantizer.code_sizes
    # tars from before labels were counted: the manifest says nothing
    labelled = [fact["labelled"] for fact in facts if "labelled" in fact]
    labels = {"samples": sum(labelled), "highest": max(fact.get("highest_label", -1) for fact in facts)}
    manifest = {
        "format": CODES_FORMAT,
        "tokenizer": options.fingerprint,
        "num_codebooks": unitok.config.num_codebooks,
        "codebook_size": max(unitok.quantizer.code_sizes),
        **({CODE_SIZES: sizes} if len(set(sizes)) > 1 else {}),
        "num_tokens": unitok.config.num_visual_tokens,
        "layout": options.layout,
        **({"scales": unitok.config.scales} if unitok.config.scales else {}),
        **({FEATURES: options.features._asdict()} if options.features else {}),
        "image_size": unitok.config.image_size,
        "mode": options.mode,
        **({"crops": NUM_CROPS, "crop_range": options.ten_crop} if options.ten_crop else {}),
        **({"labels": labels} if len(labelled) == len(facts) else {}),
        "samples": sum(fact["samples"] for fact in facts),
        # older tars: `pictures` instead of `images`, or neither; no `oblong` or `transparent`
        "images": sum(_num_images(fact) for fact in facts),
        "oblong": sum(fact.get("oblong", 0) for fact in facts),
        "transparent": sum(fact.get("transparent", 0) for fact in facts),
        "broken": sum(fact["broken"] for fact in facts),
        "notes": dict(notes),
        "checked": checked,
        "psnr": round(-10 * math.log10(max(error, 1e-10)), 3),
        "shards": shards,
        **({"image_roots": roots} if roots else {}),
    }
    write_json(out / CODES_MANIFEST, manifest)
    return manifest
