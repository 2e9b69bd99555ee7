"""Image files: PNGs with generation settings in their metadata, contact sheets, untrusted uploads."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from open_unitok.core.errors import UserError
from open_unitok.core.files import write_atomic
from open_unitok.tokenizer.images import header_size, load_image, open_image_file

GRID_GAP = 2  # pixels between the images of a contact sheet
RECORD_KEY = "unitok"  # PNG text chunk of the whole record; each entry also has a chunk, for image viewers
UPLOAD_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF", "HEIF")  # fewer readers, fewer ways in


def save_png(image: Image.Image, path: str | Path, record: dict[str, Any] | None = None) -> None:
    """Write a PNG atomically, with `record` in its text chunks, for `read_record`."""
    write_atomic(path, image_bytes(image, "png", record))


def image_bytes(image: Image.Image, kind: str = "png", record: dict[str, Any] | None = None) -> bytes:
    """The image encoded as "png", "jpeg" or "webp"; only PNG stores the record."""
    # iTXt chunks: tEXt is limited to Latin-1
    info = PngImagePlugin.PngInfo()
    for key, value in (record or {}).items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    if record is not None:
        info.add_itxt(RECORD_KEY, json.dumps(record, ensure_ascii=False, sort_keys=True))
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"pnginfo": info} if kind == "png" else {"quality": 95}))
    return buffer.getvalue()


def read_record(path: str | Path) -> dict[str, Any] | None:
    """The record of a PNG written by `save_png`, or None.

    Raises:
        UserError: the file is not a complete PNG.
    """
    try:
        with open_image_file(path, ("PNG",)) as image:
            image.load()  # decode all: a truncated file must not count as finished
            text = getattr(image, "text", {}).get(RECORD_KEY)
            return json.loads(text) if text else None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} is not a complete PNG ({error}): delete it and run again.") from error


def grid_of(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """A contact sheet on white, row by row; about as many columns as rows by default."""
    # + 0.49: rounded up, except for square numbers
    columns = columns or max(1, round(len(images) ** 0.5 + 0.49))
    rows = -(-len(images) // columns)
    width = max(image.width for image in images) + GRID_GAP
    height = max(image.height for image in images) + GRID_GAP
    sheet = Image.new("RGB", (columns * width + GRID_GAP, rows * height + GRID_GAP), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (GRID_GAP + i % columns * width, GRID_GAP + i // columns * height))
    return sheet


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) in the header of an untrusted image; decodes no pixels.

    Raises:
        UserError: the data does not begin like an image.
    """
    return header_size(data, UPLOAD_FORMATS)


def open_image(data: bytes, max_side: int, needed: tuple[int, int] | None = None) -> Image.Image:
    """Open an untrusted image as RGB; the size in its header is checked before decoding.

    Args:
        needed: (H, W) as in `load_image`.

    Raises:
        UserError: the data is not an image, is corrupt, or is too large.
    """
    return load_image(data, needed=needed, formats=UPLOAD_FORMATS, max_side=max_side)
