"""Convert data sets in common formats to the tars that `unitok extract-codes` reads.

Sample `KEY` of a tar is `KEY.jpg` (or png, webp, bmp, avif; `KEY.0.jpg`, `KEY.1.jpg`, ... where there are
several) with its `KEY.json`. Tar i holds samples i*SHARD to (i+1)*SHARD of the source. Its counts go to a
.json of the same name, written last, which marks the tar as complete: a rerun skips it. `convert.json`
describes the conversion and, once it is finished, holds the counts of all tars.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from open_unitok.core.errors import UserError, did_you_mean
from open_unitok.core.files import existing, write_json
from open_unitok.core.image_names import find_images
from open_unitok.core.text_files import read_json
from open_unitok.tokenizer.images import (
    image_errors,
    is_plain,
    load_image,
    open_image_file,
    unreadable_reason,
)

from .captions import CAPTION_CHOICES
from .formats import SOURCE_FORMATS, Source, SourceSample
from .records import check_facts
from .tar_files import tar_writer, write_sample
from .tar_index import LOGGED_BAD_SAMPLES, BadSample

_STATE_FILE = "convert.json"
# stored byte for byte
_KEPT_FORMATS = {
    "JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "AVIF": "avif",
}  # fmt: skip


def convert_dataset(
    kind: str,
    source: str | Path,
    target: str | Path,
    *,
    images: str | Path | None = None,
    column: str | None = None,
    captions: str = "all",
    shard: int = 1000,
    max_bad_share: float = 0.05,
    size: int | None = None,
    quiet: bool = False,
) -> dict[str, int]:
    """Write the tars of `source` into the folder `target`, or those that are still missing.

    Args:
        kind: a name in `SOURCE_FORMATS`.
        images: folder that the image names in `source` are relative to.
        column: key of the caption.
        captions: a value of `CAPTION_CHOICES`, for images with captions.
        size: larger images are scaled down so that their shorter side has this many pixels; None = none are.

    Returns:
        Counts by name: "samples", "images", "skipped", "without a caption", "lost images" (named by
        documents, but not on disk).

    Raises:
        UserError: no such format; nothing usable in `source`, or too many samples that are not; `target` has
            other contents.
    """
    if kind not in SOURCE_FORMATS:
        raise UserError(f"{kind!r} is not a source format.{did_you_mean(kind, SOURCE_FORMATS)}")
    if shard < 1 or not 0 <= max_bad_share <= 1:
        raise UserError("--shard must be 1 or more, --max-bad-share between 0 and 1.")
    if size is not None and size < 1:
        raise UserError(f"--size is {size}; it must be 1 or more.")
    if captions not in CAPTION_CHOICES or (captions != "all" and kind != "folder"):
        raise UserError(f"--captions is {captions}: {', '.join(CAPTION_CHOICES)} are for images in a folder.")
    origin = Source(existing(source), existing(images) if images else None, column, captions)
    out = Path(target)
    # tars inside the source would change its listing, and so its hash, while they are written
    if origin.path.is_dir() and out.resolve().is_relative_to(origin.path.resolve()):
        raise UserError(f"{target} is inside {source}: choose a folder outside of it.")
    # everything that the tars depend on: a rerun with another value is another conversion
    wanted = {
        "kind": kind,
        "shard": shard,
        "column": column,
        "captions": captions,
        "size": size,
        "source": _listing_hash(origin.path),
    }
    wanted |= {"images": str(origin.images.resolve()) if origin.images else None}
    state = _open_state(out, wanted)
    if "counts" in state:
        return state["counts"]
    counts = Counter(samples=0, images=0)
    samples = SOURCE_FORMATS[kind].samples(origin)
    with tqdm(desc=kind, unit=" samples", disable=quiet, file=sys.stderr, mininterval=1.0) as bar:
        for number in itertools.count():
            group = list(itertools.islice(samples, shard))
            if not group:
                break
            counts.update(_convert_tar(out, number, group, size))
            bar.update(len(group))
            # a single one is allowed: one sample of a small data set may exceed the share
            if counts["skipped"] > max(1, max_bad_share * (counts["samples"] + counts["skipped"])):
                _discard(out)
                raise UserError(
                    f"{counts['skipped']} of {counts['samples'] + counts['skipped']} samples of {source} "
                    f"cannot be used, more than --max-bad-share {max_bad_share:g} allows: see above."
                )
    if not counts["samples"]:
        _discard(out)
        note = find_images(origin.path).note(origin.path) if origin.path.is_dir() else ""
        raise UserError(
            f"{source} has no usable sample; expected {SOURCE_FORMATS[kind].expected}{note and f' ({note}.)'}"
        )
    # absolute names in conversations lead to the same images, see `CodeFolder.image`
    root = os.path.realpath(origin.folder)
    write_json(out / _STATE_FILE, {**wanted, "counts": dict(counts), "root": root})
    return dict(counts)


def _open_state(out: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The state of the same conversion in `out`; raises UserError if `out` has other contents."""
    if (out / _STATE_FILE).exists():
        found = check_facts(out / _STATE_FILE, read_json(out / _STATE_FILE), {"kind": str}, "delete it")
        # conversions from before choices of captions do not store one
        found = {"captions": "all", **found}
        if "counts" in found:
            _checked_counts(out / _STATE_FILE, found["counts"])
        differing = [name for name, value in wanted.items() if found.get(name) != value]
        if not differing:
            return found
        reason = "the source has changed" if differing == ["source"] else f"other {', '.join(differing)}"
        raise UserError(f"{out} was converted before ({reason}): delete it, or choose another folder.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} has other contents: choose a new or empty folder.")
    write_json(out / _STATE_FILE, wanted)
    return wanted


def conversion_root(folder: Path) -> str | None:
    """The folder whose images were converted to the tars in `folder`, if it is a conversion."""
    with contextlib.suppress(UserError):
        state = read_json(folder / _STATE_FILE)
        if isinstance(state, dict) and isinstance(state.get("root"), str):
            return state["root"]
    return None


def _discard(out: Path) -> None:
    """Remove a failed conversion, so that a corrected command starts over and logs skipped samples again."""
    for part in (*out.glob("part-*"), *out.glob(".*.tmp"), out / _STATE_FILE):  # a kill leaves .tmp files
        part.unlink()
    out.rmdir()


def _listing_hash(path: Path) -> str:
    """Hex digest of names, sizes and times of a file, or of all files in a folder."""
    # not the contents: hashing a large data set would take as long as converting it
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    stats = [(str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def _checked_counts(path: Path, counts: Any) -> dict[str, int]:
    """The counts that a conversion wrote."""
    known = dict.fromkeys(counts, int) if isinstance(counts, dict) else {}
    return check_facts(path, counts, known, "delete the folder and convert again")


def _convert_tar(out: Path, number: int, group: list[SourceSample], size: int | None) -> dict[str, int]:
    """Write one tar, unless it is complete; returns its counts."""
    path = out / f"part-{number:06d}.tar"
    description = path.with_suffix(".json")
    if description.exists():
        return _checked_counts(description, read_json(description))
    counts: Counter[str] = Counter()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            with tar_writer(file) as writer:
                for sample in group:
                    _add_sample(writer, sample, counts, size)
            file.flush()
            os.fsync(file.fileno())
        # a group without a usable sample leaves no tar, but its counts
        if counts["samples"]:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    write_json(description, dict(counts))
    return counts


def _add_sample(writer: Any, sample: SourceSample, counts: Counter[str], size: int | None) -> None:
    """Add a sample's images and its .json, or log why it cannot be used."""
    try:
        if sample.problem:
            raise BadSample(sample.problem)
        images = [read_upright(path, size) for path in sample.images]
    except BadSample as error:
        counts["skipped"] += 1
        if counts["skipped"] <= LOGGED_BAD_SAMPLES:
            tqdm.write(f"data: skipped {sample.key}: {error}", file=sys.stderr)
        return
    single = len(images) == 1
    members = {e if single else f"{i}.{e}": data for i, (e, data) in enumerate(images)}
    text = json.dumps({**sample.info, "images": len(images)}, ensure_ascii=False, separators=(",", ":"))
    write_sample(writer, sample.key, {**members, "json": text.encode()})
    counts["samples"] += 1
    counts["images"] += len(images)
    if "captions" in sample.info and not (sample.info["captions"] or sample.info.get("long_caption")):
        counts["without a caption"] += 1
    if sample.info.get("lost"):
        counts["lost images"] += sample.info["lost"]


def read_upright(path: Path, size: int | None = None) -> tuple[str, bytes]:
    """(extension, bytes) of an image file as `load_image` reads it: upright, opaque, 8-bit RGB.

    A file that already is so is returned byte for byte. Otherwise the image is re-encoded, without loss
    unless it was an RGB or grey JPEG.

    Args:
        size: side in pixels to which the shorter side is scaled down.

    Raises:
        BadSample: there is no such file, or it is not an image.
    """
    try:
        data = path.read_bytes()
        with image_errors(data), open_image_file(data) as image:
            kind = image.format
            lossy = kind in ("JPEG", "MPO") and image.mode != "CMYK"
            larger = size is not None and min(image.size) > size
            if not larger and is_plain(image) and kind in _KEPT_FORMATS:
                return _KEPT_FORMATS[kind], data
        upright = load_image(data, needed=(size, size) if larger and size else None)
    except (OSError, UserError) as error:
        raise BadSample(f"{path}: {unreadable_reason(path, error)}") from error
    if larger and size:
        width, height = upright.size
        scale = size / min(width, height)
        upright = upright.resize(
            (max(size, round(width * scale)), max(size, round(height * scale))), Image.Resampling.BICUBIC
        )
    buffer = io.BytesIO()
    # a JPEG's artefacts would make a PNG several times as large
    if lossy:
        upright.save(buffer, "JPEG", quality=95, subsampling=0)
        return "jpg", buffer.getvalue()
    upright.save(buffer, "PNG")
    return "png", buffer.getvalue()
