"""Images to pixels in [-1, 1] and back (the preprocessing of published UniTok's scripts).

`load_image` is the one reader of image files. It turns them upright by their EXIF orientation, takes the
first frame, scales deep greys to 8 bits and composites transparent pixels on white (`image_modes.py`). ICC
profiles are ignored.

H height, W width in pixels.
"""

import contextlib
import functools
import importlib.util
import io
import math
import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image

from open_unitok.core.errors import UserError, did_you_mean
from open_unitok.core.image_names import IMAGE_SUFFIXES as IMAGE_SUFFIXES

from .image_modes import scale_png_transparency, to_rgb

MAX_PIXELS = 178_956_970  # Pillow's limit against decompression bombs
PAD_COLOUR = (122, 116, 104)  # CLIP's mean colour, the border of padded images
GREY = (127, 127, 127)  # the border in LLaVA's recipe for a mean of .5
MODES = ("crop", "pad", "pad_grey", "squash")
# Pillow's readers; others run external programs (EPS) or read what is no image
FORMATS = (
    "PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM", "TGA", "ICO", "DIB",
)  # fmt: skip
DRAFT_GAP = 2  # a JPEG decoded at reduced size keeps this many times the pixels per side that are needed
# raised by Pillow's readers on corrupt images
PILLOW_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, AttributeError,
    RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
# enlarged beyond this many pixels, a thin image is cropped first: 1 x 5,000,000 would need gigabytes
_LARGE_CANVAS = 2**24
_ORIENTATION = 0x0112  # EXIF tag
_TURNS = dict(
    zip(
        range(2, 9),
        (
            Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_90,
        ),
    )
)  # fmt: skip
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

ImageSource = str | os.PathLike[str] | bytes | Image.Image


def load_image(
    source: ImageSource,
    *,
    needed: tuple[int, int] | None = None,
    formats: Sequence[str] = FORMATS,
    max_side: int | None = None,
) -> Image.Image:
    """An image file, its bytes, or a PIL image -> a new upright RGB image without metadata.

    `info` of the result has the key `image_modes.WAS_TRANSPARENT` if a pixel was composited.

    Args:
        needed: (H, W) that the caller scales the image to. A JPEG much larger than it is decoded at 1/2, 1/4
            or 1/8 of its size, but never below `DRAFT_GAP` times `needed`: several times as fast for
            large photographs, and within 44 to 57 dB and 97 to 100 % of the codes of the whole image.
        formats: names of Pillow's readers that may be tried.
        max_side: limit of width and height, checked in the header.

    Raises:
        UserError: the source is not a readable image; the message names the file.
    """
    with image_errors(source, formats) as name:
        if isinstance(source, Image.Image):
            return _decode(source, name, None, max_side)
        with open_image_file(source, formats) as image:
            return _decode(image, name, needed, max_side)


def header_size(source: str | os.PathLike[str] | bytes, formats: Sequence[str] = FORMATS) -> tuple[int, int]:
    """(width, height) in the header of an image file, as stored; decodes no pixels.

    Raises:
        UserError: the source does not begin like an image.
    """
    with image_errors(source, formats), open_image_file(source, formats) as image:
        return image.size


@contextlib.contextmanager
def image_errors(source: ImageSource, formats: Sequence[str] = FORMATS) -> Iterator[str]:
    """The name of the source in errors; Pillow's errors become UserErrors, its warnings are dropped."""
    name = "The given content" if isinstance(source, bytes) else str(source)
    name = "The given image" if isinstance(source, Image.Image) else name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield name
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} has too many pixels to decode: {error}") from error
    except UserError:
        raise
    except PILLOW_ERRORS as error:
        raise UserError(f"{name} is not a readable image: {_reason(source, error, formats)}") from error


def open_image_file(source: str | os.PathLike[str] | bytes, formats: Sequence[str] = FORMATS) -> Image.Image:
    """The header of an image file or its bytes; raises UserError for a missing file, else `PILLOW_ERRORS`."""
    if not isinstance(source, (bytes, str, os.PathLike)):
        kind = type(source).__name__
        raise UserError(f"Cannot read {kind} as an image: expected a path, bytes or a PIL image.")
    if not isinstance(source, bytes) and not os.path.isfile(source):
        raise UserError(f"{source} is not an existing file.")
    has_heif = "HEIF" in formats and _register_heif()
    # Pillow raises KeyError for a reader that is not registered
    tried = [name for name in formats if name != "HEIF" or has_heif]
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=tried)


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none, or none that can be read."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except PILLOW_ERRORS:
        return 1
    return value if value in _TURNS else 1


def unreadable_reason(source: ImageSource, error: Exception, formats: Sequence[str] = FORMATS) -> str:
    """Why `source` cannot be read as an image, in one line; `error` is what reading it raised."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return str(error) if isinstance(error, UserError) else _reason(source, error, formats)


def is_plain(image: Image.Image) -> bool:
    """Decodes an opened file: whether it is one upright, opaque 8-bit image, so that any reader agrees on it.

    Raises:
        one of PILLOW_ERRORS: the file is corrupt.
    """
    _check_size(image, "The file", None)
    image.draft(None, (1, 1))  # of a JPEG all is read, but little is decoded
    image.load()
    return (
        image.mode in ("1", "L", "P", "RGB")
        and not image.has_transparency_data
        and (getattr(image, "n_frames", 1) == 1 or image.format == "MPO")  # its frames are JPEGs in a row
        and orientation_of(image) == 1
    )


def to_pixels(
    image: Image.Image,
    size: int | tuple[int, int],
    mode: str = "crop",
    resize: int | None = None,
    resample: Image.Resampling | None = None,
) -> torch.Tensor:
    """An image -> (3, H, W) float32 in [-1, 1]; other than plain RGB goes through `load_image`.

    Args:
        size: (H, W), or the side of a square.
        mode: "crop" scales the image to cover the size and crops the centre; "pad" centres it on a canvas of
            `PAD_COLOUR` with the size's aspect ratio and scales the canvas; "pad_grey" does so with `GREY`;
            "squash" scales both sides independently.
        resize: for "crop": the shorter side in pixels before the crop; None = the scale that covers the
            size, 0 = unscaled (black outside the image).
        resample: Pillow's filter; None = bicubic for "crop" and "pad_grey", else bilinear, as published.

    Raises:
        UserError: the mode is not known; padding needs a canvas of more than `MAX_PIXELS`.
    """
    if mode not in MODES:
        raise UserError(f"mode = {mode!r}." + did_you_mean(mode, MODES))
    height, width = (size, size) if isinstance(size, int) else size
    image = _plain_rgb(image)
    if mode == "crop":
        scaled = _scaled_size(image, (height, width), resize)
        resample = resample or Image.Resampling.BICUBIC
        if scaled[0] * scaled[1] > max(_LARGE_CANVAS, image.width * image.height):
            image = _scale_centre(image, scaled, (height, width), resample)
        elif scaled != image.size:
            image = image.resize(scaled, resample)
        return from_pil(_centre_crop(image, height, width))
    # before scaling, so that the border covers the same share of the image at every size
    if mode == "pad":
        image = _pad(image, (height, width), PAD_COLOUR)
    elif mode == "pad_grey":
        image, resample = _pad(image, (height, width), GREY), resample or Image.Resampling.BICUBIC
    return from_pil(image.resize((width, height), resample or Image.Resampling.BILINEAR))


def adm_crop(image: Image.Image, size: int | tuple[int, int]) -> Image.Image:
    """The centre crop of ADM's and LlamaGen's ImageNet references; `size` is (H, W) or a square's side."""
    height, width = (size, size) if isinstance(size, int) else size
    # published order: halve with box filters while both sides allow it, then one bicubic step
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def ten_crops(image: Image.Image, side: int, crop_range: float) -> list[torch.Tensor]:
    """The ten crops (3, side, side) of ADM's centre crop to int(side * crop_range): the four corners and the
    centre, then those of its mirror image; the augmentation of LlamaGen's codes, in its order."""
    scaled = adm_crop(_plain_rgb(image), int(side * crop_range))
    rest = scaled.width - side
    centre = round(rest / 2)
    corners = ((0, 0), (rest, 0), (0, rest), (rest, rest), (centre, centre))
    both = (scaled, scaled.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    return [from_pil(one.crop((x, y, x + side, y + side))) for one in both for x, y in corners]


def from_pil(image: Image.Image) -> torch.Tensor:
    """An image, unscaled, otherwise as `to_pixels` -> (3, H, W) float32 in [-1, 1]."""
    # np.array copies: torch warns about the read-only memory of a PIL image
    array = torch.from_numpy(np.array(_plain_rgb(image))).permute(2, 0, 1).contiguous()
    return (array.float() / 255 - 0.5) / 0.5


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels of any shape in [-1, 1] -> 0 to 255, rounded half to even and clamped; NaN becomes grey."""
    return ((pixels.float().nan_to_num(0.0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(pixels: torch.Tensor) -> Image.Image:
    """(3, H, W) pixels in [-1, 1] -> an RGB image."""
    return Image.fromarray(to_uint8(pixels.detach()).permute(1, 2, 0).cpu().contiguous().numpy())


def image_psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB of two images of equal size; infinite where they are equal."""
    error = float(np.mean((np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def _decode(
    image: Image.Image, name: str, needed: tuple[int, int] | None, max_side: int | None
) -> Image.Image:
    _check_size(image, name, max_side)
    scale_png_transparency(image)
    if needed is not None and image.format in ("JPEG", "MPO"):
        # the stored image lies on its side for orientations 5 to 8
        rows, columns = needed[::-1] if orientation_of(image) > 4 else needed
        image.draft(None, (DRAFT_GAP * columns, DRAFT_GAP * rows))
    if image.format == "TIFF" and orientation_of(image) > 4 and getattr(image, "tile", None):
        image.filename = ""  # pyright: ignore[reportAttributeAccessIssue] # else Pillow maps the file's pixels with the sides swapped
    # before the orientation: Pillow turns a TIFF in `load`, and a PNG may have its EXIF after the pixels
    image.load()
    turn = _TURNS.get(orientation_of(image))
    try:
        rgb = to_rgb(image)
    except UserError as error:
        raise UserError(f"{name} cannot be read as 8 bits per colour: {error}") from error
    if turn is None:
        return rgb
    turned = rgb.transpose(turn)
    turned.info = rgb.info
    return turned


def _check_size(image: Image.Image, name: str, max_side: int | None) -> None:
    """Reject an image by its header, before anything decompresses its pixels."""
    width, height = image.size
    if max_side is not None and max(width, height) > max_side:
        raise UserError(f"{name} has {width} x {height} pixels; the limit per side is {max_side}.")
    if width * height > MAX_PIXELS:
        raise UserError(f"{name} has {width} x {height} pixels, more than {MAX_PIXELS:,}.")


@functools.cache
def _register_heif() -> bool:
    """Make Pillow read HEIC where pillow-heif is installed."""
    if importlib.util.find_spec("pillow_heif") is None:
        return False
    from pillow_heif import register_heif_opener  # optional

    register_heif_opener()
    return True


def _reason(source: ImageSource, error: Exception, formats: Sequence[str]) -> str:
    """Why an image cannot be read, in one line."""
    if isinstance(source, Image.Image):
        return str(error)
    if isinstance(source, bytes):
        head = source[:32]
    else:
        try:
            with open(source, "rb") as file:
                head = file.read(32)
        except OSError:
            return str(error)
    if not head:
        return "it is empty."
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS and "HEIF" in formats and not _register_heif():
        return "HEIC needs pillow-heif: pip install pillow-heif."
    if isinstance(error, Image.UnidentifiedImageError):
        return f"it is not one of {', '.join(formats)}."
    return str(error)


def _plain_rgb(image: Image.Image) -> Image.Image:
    """The image, through `load_image` if it may need to be turned, scaled to 8 bits or composited."""
    return image if image.mode == "RGB" and not image.info else load_image(image)


def _pad(image: Image.Image, shape: tuple[int, int], colour: tuple[int, int, int]) -> Image.Image:
    """The image centred on the smallest canvas with the aspect ratio of `shape` (H, W)."""
    (width, height), (rows, columns) = image.size, shape
    canvas_width = max(width, -(-height * columns // rows))  # rounded up
    canvas_height = max(height, -(-width * rows // columns))
    if (canvas_width, canvas_height) == image.size:
        return image
    if canvas_width * canvas_height > MAX_PIXELS:
        raise UserError(
            f"The image has {width} x {height} pixels: padded to the model's aspect ratio it would have more "
            f"than {MAX_PIXELS:,}. Crop it."
        )
    canvas = Image.new("RGB", (canvas_width, canvas_height), colour)
    canvas.paste(image, ((canvas_width - width) // 2, (canvas_height - height) // 2))
    return canvas


def _scaled_size(image: Image.Image, shape: tuple[int, int], resize: int | None) -> tuple[int, int]:
    """(width, height) before the centre crop; the longer side is rounded down, as torchvision does."""
    (width, height), (rows, columns) = image.size, shape
    if resize == 0:
        return image.size
    if resize is not None:
        rows = columns = resize
    # Scale by the larger of the two factors columns / width and rows / height, compared without division.
    if width * rows <= height * columns:
        return columns, int(columns * height / width)
    return int(rows * width / height), rows


def _scale_centre(
    image: Image.Image, scaled: tuple[int, int], shape: tuple[int, int], resample: Image.Resampling
) -> Image.Image:
    """What `shape` (H, W) shows of the image enlarged to `scaled` (width, height), without the rest."""
    crop, box, target = [0, 0, 0, 0], [0.0, 0.0, 0.0, 0.0], [0, 0]
    for axis, needed in enumerate(shape[::-1]):
        ratio = image.size[axis] / scaled[axis]
        target[axis] = min(needed, scaled[axis])
        start = round((scaled[axis] - target[axis]) / 2) * ratio
        end = start + target[axis] * ratio
        # filters reach 3 pixels beyond the box
        crop[axis] = max(0, math.floor(start) - 3)
        crop[axis + 2] = min(image.size[axis], math.ceil(end) + 3)
        box[axis], box[axis + 2] = start - crop[axis], min(end, crop[axis + 2]) - crop[axis]
    left, top, right, bottom = crop
    part = image.crop((left, top, right, bottom))
    return part.resize((target[0], target[1]), resample, box=(box[0], box[1], box[2], box[3]))


def _centre_crop(image: Image.Image, rows: int, columns: int) -> Image.Image:
    """The centre (rows, columns), black where the image is smaller; rounded as in torchvision."""
    # torchvision's rounding: floor for the border of a smaller image, half to even for the crop of a larger
    left, top = (
        -(-gap // 2) if gap <= 0 else round(gap / 2) for gap in (image.width - columns, image.height - rows)
    )
    return image.crop((left, top, left + columns, top + rows))
