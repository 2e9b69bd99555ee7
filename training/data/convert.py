"""Data sets in common layouts to the tars that `unitok extract-codes` reads.

Sample `KEY` of a tar is `KEY.jpg` (or png, webp, bmp; `KEY.0.jpg`, `KEY.1.jpg`, ... where there are several)
beside `KEY.json`. Tar i holds the samples i*SHARD to (i+1)*SHARD of the source; what was found goes to a
.json beside it, written last: where that stands, the tar is whole and is not made again. `convert.json` says
what the tars were made of and, at the end, how many samples there are.
"""

import hashlib
import io
import itertools
import json
import os
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from tqdm import tqdm

from open_unitok.core.errors import UserError, did_you_mean
from open_unitok.core.files import existing, read_json, write_json

from .formats import LAYOUTS, Item, Source
from .tar_index import LOGGED_BAD_SAMPLES, BadSample

STATE = "convert.json"
KEPT_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp"}  # copied as they are
ORIENTATION = 0x0112  # the EXIF tag that says how a camera was held


def convert(
    kind: str,
    source: str | Path,
    target: str | Path,
    *,
    images: str | Path | None = None,
    column: str | None = None,
    shard: int = 1000,
    max_bad_share: float = 0.05,
    quiet: bool = False,
) -> dict[str, int]:
    """Write the tars of `source` into the folder `target`, or those that are still missing.

    Args:
        kind: a name in `LAYOUTS`.
        images: folder that the image names in `source` are relative to.
        column: the key that holds the caption.

    Returns:
        Counts by name: "samples", "images", "skipped", "without a caption", "lost images" (named by
        documents, but not on disk).

    Raises:
        UserError: no such layout; nothing usable in `source`, or too much unusable; `target` holds something
            else.
    """
    if kind not in LAYOUTS:
        raise UserError(f"There is no layout {kind!r}.{did_you_mean(kind, LAYOUTS)}")
    if shard < 1 or not 0 <= max_bad_share <= 1:
        raise UserError("--shard is 1 or more, --max-bad-share is between 0 and 1.")
    place = Source(existing(source), existing(images) if images else None, column)
    out = Path(target)
    if place.path.is_dir() and out.resolve().is_relative_to(place.path.resolve()):
        raise UserError(f"{target} lies within {source}: choose a folder outside of it.")
    wanted = {"kind": kind, "shard": shard, "column": column, "source": _listing(place.path)}
    wanted |= {"images": str(place.images.resolve()) if place.images else None}
    found = _begin(out, wanted)
    if "counts" in found:
        return found["counts"]
    counts = Counter(samples=0, images=0)
    items = LAYOUTS[kind].items(place)
    with tqdm(desc=kind, unit=" samples", disable=quiet, file=sys.stderr, mininterval=1.0) as bar:
        for number in itertools.count():
            group = list(itertools.islice(items, shard))
            if not group:
                break
            counts.update(_convert_tar(out, number, group))
            bar.update(len(group))
            # a single one is never too much: small data sets have few
            if counts["skipped"] > max(1, max_bad_share * (counts["samples"] + counts["skipped"])):
                _forget(out)
                raise UserError(
                    f"{counts['skipped']} of {counts['samples'] + counts['skipped']} samples of {source} "
                    f"cannot be used, more than --max-bad-share {max_bad_share:g} allows: see above."
                )
    if not counts["samples"]:
        _forget(out)
        raise UserError(f"{source} holds nothing usable: {LAYOUTS[kind].wanted}")
    write_json(out / STATE, {**wanted, "counts": dict(counts)})
    return dict(counts)


def _begin(out: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """What `out` holds of this very conversion; raises UserError if it holds something else."""
    if (out / STATE).exists():
        found = read_json(out / STATE)
        differing = [name for name, value in wanted.items() if found.get(name) != value]
        if not differing:
            return found
        what = "the source has changed" if differing == ["source"] else f"other {', '.join(differing)}"
        raise UserError(f"{out} was converted before ({what}): delete it, or choose another folder.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} holds something else: choose a new or empty folder.")
    write_json(out / STATE, wanted)
    return wanted


def _forget(out: Path) -> None:
    """Take away a conversion that failed: the mended command begins anew, and says again what it skips."""
    for part in (*out.glob("part-*"), *out.glob(".*.tmp"), out / STATE):  # a kill leaves .tmp files behind
        part.unlink()
    out.rmdir()


def _listing(path: Path) -> str:
    """Hex digest of names, sizes and times of a file, or of all files in a folder."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    stats = [(str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def _convert_tar(out: Path, number: int, group: list[Item]) -> dict[str, int]:
    """One tar, unless it is there; returns its counts."""
    path = out / f"part-{number:06d}.tar"
    described = path.with_suffix(".json")
    if described.exists():
        return read_json(described)
    counts: Counter[str] = Counter()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
                for item in group:
                    _add_item(tar, item, counts)
            file.flush()
            os.fsync(file.fileno())
        if counts["samples"]:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    write_json(described, dict(counts))
    return counts


def _add_item(tar: tarfile.TarFile, item: Item, counts: Counter[str]) -> None:
    """Add a sample's images and its .json, or note why it cannot be used."""
    try:
        if item.problem:
            raise BadSample(item.problem)
        pictures = [read_image(path) for path in item.pictures]
    except BadSample as error:
        counts["skipped"] += 1
        if counts["skipped"] <= LOGGED_BAD_SAMPLES:
            tqdm.write(f"data: skipped {item.key}: {error}", file=sys.stderr)
        return
    single = len(pictures) == 1
    members = [(f".{e}" if single else f".{i}.{e}", data) for i, (e, data) in enumerate(pictures)]
    text = json.dumps({**item.info, "images": len(pictures)}, ensure_ascii=False, separators=(",", ":"))
    for ending, data in [*members, (".json", text.encode())]:
        member = tarfile.TarInfo(item.key + ending)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    counts["samples"] += 1
    counts["images"] += len(pictures)
    if "captions" in item.info and not (item.info["captions"] or item.info.get("long_caption")):
        counts["without a caption"] += 1
    if item.info.get("lost"):
        counts["lost images"] += item.info["lost"]


def read_image(path: Path) -> tuple[str, bytes]:
    """(extension, bytes) of an image file, as it is where extraction can read it; turned upright.

    Raises:
        BadSample: there is no such file, or it is no image.
    """
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            upright = image.getexif().get(ORIENTATION, 1) == 1
            if upright and image.format in KEPT_FORMATS:
                return KEPT_FORMATS[image.format], data
            turned = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise BadSample(f"{path}: {reason}") from error
    buffer = io.BytesIO()
    kind, extension = ("JPEG", "jpg") if image.format == "JPEG" else ("PNG", "png")
    turned.save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return extension, buffer.getvalue()
