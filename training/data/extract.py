"""Image shards to code shards, so that the MLLM trains without the visual tokenizer.

Sample KEY of a tar is `KEY.jpg` (png, webp, bmp), or `KEY.0.jpg`, `KEY.1.jpg`, ..., next to `KEY.json` or
`KEY.txt` (a caption); "images" in the .json says how many images there must be, 0 is allowed.

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
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.image_modes import WAS_TRANSPARENT
from open_unitok.tokenizer.images import load_image, to_pixels

from .captions import with_captions
from .code_shards import CODE_SIZES, CODES_FORMAT, CODES_MANIFEST
from .convert import conversion_root
from .records import check_facts, unused_key
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


class LoadedSample(NamedTuple):
    """A sample with its images: mostly one, several in conversations and documents, or none."""

    key: str
    file: str  # name of the first image
    images: list[torch.Tensor]  # each (3, H, W)
    info: dict[str, Any]
    transparent: int  # images that were composited on a background
    reshaped: int  # images of another aspect ratio than the tokenizer's, which are cropped or padded


def extract_codes(
    unitok: UniTok, tars: list[str], out: Path, options: ExtractOptions, quiet: bool = False
) -> dict[str, Any] | None:
    """Write this rank's tars; returns the contents of codes.json if the tars of all ranks exist, else None.

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
            _extract_tar(unitok, tars[number], out / _tar_name(number), options, bar.update)
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
    expected = _origin(tar, options)
    # descriptions from before token layouts and choices of captions do not have one
    facts = {"layout": options.layout, "captions": "all", **facts}
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
    }


def _extract_tar(
    unitok: UniTok, tar: str, target: Path, options: ExtractOptions, progress: Callable[[int], Any]
) -> None:
    """One tar of images to one tar of codes, then its description."""
    source = StreamedTar(tar) if is_stream(tar) else scan_tar(tar)
    if source.problem:
        raise _broken(tar, source.problem)
    if source.notes:  # they may explain why samples are unreadable
        tqdm.write(f"codes: {shown(tar)}: {describe_notes(source.notes)}", file=sys.stderr)
    records = source if isinstance(source, StreamedTar) else source.samples
    bad: list[str] = []
    buffer, first = io.BytesIO(), []
    counts, keys = Counter(samples=0, images=0, oblong=0, transparent=0), set()
    with tar_writer(buffer) as writer:
        for batch in _batches(records, unitok.config.image_shape, options, bad, progress):
            # the images of all samples as one list: a sample has any number of them
            pixels = [image for sample in batch for image in sample.images]
            codes = iter(_encode(unitok, pixels, options.batch_size))
            for sample in batch:
                # without dots, which end a key
                key = unused_key(sample.key.replace(".", "_"), sample.file, keys)
                members = _code_members(sample, [next(codes) for _ in sample.images], unitok)
                write_sample(writer, key, members)
            # kept to verify the written tar
            first += pixels[: VERIFIED_IMAGES - len(first)]
            counts.update(samples=len(batch), images=len(pixels))
            counts.update(oblong=sum(sample.reshaped for sample in batch))
            counts.update(transparent=sum(sample.transparent for sample in batch))
    if source.problem:  # of a stream, known once it has been read
        raise _broken(tar, source.problem)
    if source.notes and isinstance(source, StreamedTar):
        tqdm.write(f"codes: {shown(tar)}: {describe_notes(source.notes)}", file=sys.stderr)
    if not counts["samples"]:
        raise UserError(f"{shown(tar)} holds no readable image ({bad[-1] if bad else 'it is empty'}).")
    # the whole tar in memory: codes are small, and a killed process leaves no partial file
    write_atomic(target, buffer.getvalue())
    error = _verify(target, counts["samples"], unitok, first)
    left_out = {"broken": len(bad), "notes": {reason: count for reason, (count, _) in source.notes.items()}}
    left_out |= {"image_root": conversion_root(Path(tar).parent)} if Path(tar).is_file() else {}
    checked = {"checked": len(first), "error": error, "sha256": sha256(target)}
    write_json(target.with_suffix(".json"), {**_origin(tar, options), **counts, **left_out, **checked})


def _broken(tar: str, problem: str) -> UserError:
    return UserError(f"{shown(tar)} is broken: {problem}. Repair it, or leave it out of --data.")


def _encode(unitok: UniTok, pixels: list[torch.Tensor], batch_size: int) -> list[np.ndarray]:
    """The codes of each image, (N, K), in the dtype that is stored."""
    found: list[np.ndarray] = []
    for start in range(0, len(pixels), batch_size):
        batch = torch.stack(pixels[start : start + batch_size]).to(unitok.device)
        found += list(unitok.encode(batch).cpu().numpy().astype(stored_dtype(unitok)))
    return found


def _batches(
    records: Iterable[TarSample],
    shape: tuple[int, int],
    options: ExtractOptions,
    bad: list[str],
    progress: Callable[[int], Any],
) -> Iterator[list[LoadedSample]]:
    """Batches of readable samples; unreadable ones are added to `bad`, too many raise UserError."""

    def load(record: TarSample) -> LoadedSample | str:
        try:
            return _load(record, shape, options)
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


def _load(record: TarSample, shape: tuple[int, int], options: ExtractOptions) -> LoadedSample:
    members, info = image_members(record)
    info = with_captions(record, info, options.captions)
    height, width = shape
    images = [load_image(record.read(member), needed=shape) for member in members]
    transparent = sum(WAS_TRANSPARENT in image.info for image in images)
    reshaped = sum(image.width * height != image.height * width for image in images)
    if len(images) == 1:
        info.setdefault("file", record.file)  # the name by which conversations look it up
    pixels = [to_pixels(image, shape, options.mode) for image in images]
    return LoadedSample(record.key, record.file or record.key, pixels, info, transparent, reshaped)


def _code_members(sample: LoadedSample, codes: list[np.ndarray], unitok: UniTok) -> dict[str, bytes]:
    """A sample's codes, (N, K), or (I, N, K) for other than one image, and its .json."""
    no_images = (0, unitok.config.num_visual_tokens, unitok.config.num_codebooks)
    stacked = np.stack(codes) if codes else np.empty(no_images, dtype=stored_dtype(unitok))
    array = io.BytesIO()
    np.save(array, codes[0] if len(codes) == 1 else stacked, allow_pickle=False)
    info = {**sample.info, "grid": unitok.config.layout.grid} if codes else sample.info
    text = json.dumps(info, ensure_ascii=False, separators=(",", ":"))
    return {"codes.npy": array.getvalue(), "json": text.encode()}


def _verify(path: Path, samples: int, unitok: UniTok, first: list[torch.Tensor]) -> float:
    """Read a written tar back and decode its first codes; returns the summed squared errors of these images.

    Raises:
        UserError: the tar does not hold the written samples.
    """
    records, problem, _ = scan_tar(str(path))
    if problem or len(records) != samples or set(records[-1].members) != {"codes.npy", "json"}:
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
    manifest = {
        "format": CODES_FORMAT,
        "tokenizer": options.fingerprint,
        "num_codebooks": unitok.config.num_codebooks,
        "codebook_size": max(unitok.quantizer.code_sizes),
        **({CODE_SIZES: sizes} if len(set(sizes)) > 1 else {}),
        "num_tokens": unitok.config.num_visual_tokens,
        "layout": options.layout,
        **({"scales": unitok.config.scales} if unitok.config.scales else {}),
        "image_size": unitok.config.image_size,
        "mode": options.mode,
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
