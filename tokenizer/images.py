"""Images to pixels in [-1, 1] and back (the preprocessing of published UniTok's scripts).

H height, W width in pixels.
"""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import torch
from PIL import Image

from open_unitok.core.errors import UserError, did_you_mean

MAX_PIXELS = 178_956_970  # Pillow's limit against decompression bombs
PAD_COLOUR = (122, 116, 104)  # CLIP's mean colour, the border of padded images
MODES = ("crop", "pad", "squash")
# raised by Pillow's readers on corrupt images
PILLOW_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, AttributeError,
    RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip

ImageSource = str | os.PathLike[str] | bytes | Image.Image


def load_image(source: ImageSource) -> Image.Image:
    """An image file, its bytes, or a PIL image -> an RGB PIL image.

    Raises:
        UserError: the source is not a readable image; the message names the file.
    """
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if not isinstance(source, (bytes, str, os.PathLike)):
        kind = type(source).__name__
        raise UserError(f"Cannot read {kind} as an image: expected a path, bytes or a PIL image.")
    name = "The given content" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes) and not os.path.isfile(source):
        raise UserError(f"{name} is not an existing file.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                # The size is in the header: check it before `convert` decompresses the pixels.
                if image.width * image.height > MAX_PIXELS:
                    raise UserError(
                        f"{name} has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}."
                    )
                return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} has too many pixels to decode: {error}") from error
    except UserError:
        raise
    except PILLOW_ERRORS as error:
        raise UserError(f"{name} is not a readable image: {error}") from error


def to_pixels(
    image: Image.Image,
    size: int | tuple[int, int],
    mode: str = "crop",
    resize: int | None = None,
    resample: Image.Resampling | None = None,
) -> torch.Tensor:
    """An RGB image -> (3, H, W) float32 in [-1, 1].

    Args:
        size: (H, W), or the side of a square.
        mode: "crop" scales the image to cover the size and crops the centre; "pad" centres it on a canvas of
            `PAD_COLOUR` with the size's aspect ratio and scales the canvas; "squash" scales both sides
            independently.
        resize: for "crop": the shorter side in pixels before the crop; None = the scale that covers the
            size, 0 = unscaled (black outside the image).
        resample: Pillow's filter; None = bicubic for "crop", else bilinear, as published.

    Raises:
        UserError: the mode is not known; the aspect ratio is so extreme that the canvas would exceed
            `MAX_PIXELS`.
    """
    if mode not in MODES:
        raise UserError(f"mode = {mode!r}." + did_you_mean(mode, MODES))
    height, width = (size, size) if isinstance(size, int) else size
    if mode == "crop":
        scaled = _scaled_size(image, (height, width), resize)
        _check_pixels(image, max(scaled[0], width) * max(scaled[1], height))
        if scaled != image.size:
            image = image.resize(scaled, resample or Image.Resampling.BICUBIC)
        return from_pil(_centre_crop(image, height, width))
    if mode == "pad":  # before scaling, so that the border covers the same share of the image at every size
        image = _pad(image, (height, width), PAD_COLOUR)
    return from_pil(image.resize((width, height), resample or Image.Resampling.BILINEAR))


def from_pil(image: Image.Image) -> torch.Tensor:
    """An RGB image, unscaled -> (3, H, W) float32 in [-1, 1]."""
    # np.array copies: torch warns about the read-only memory of a PIL image
    array = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
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


def _check_pixels(image: Image.Image, pixels: int) -> None:
    """Reject canvases above `MAX_PIXELS`: a 1 x 100,000,000 image of some kilobytes would need petabytes."""
    if pixels > MAX_PIXELS:
        raise UserError(
            f"The image has {image.width} x {image.height} pixels: with the model's aspect ratio it would "
            f"have more than {MAX_PIXELS:,}. Crop it."
        )


def _pad(image: Image.Image, shape: tuple[int, int], colour: tuple[int, int, int]) -> Image.Image:
    """The image centred on the smallest canvas with the aspect ratio of `shape` (H, W)."""
    (width, height), (rows, columns) = image.size, shape
    canvas_width = max(width, -(-height * columns // rows))  # rounded up
    canvas_height = max(height, -(-width * rows // columns))
    if (canvas_width, canvas_height) == image.size:
        return image
    _check_pixels(image, canvas_width * canvas_height)
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


def _centre_crop(image: Image.Image, rows: int, columns: int) -> Image.Image:
    """The centre (rows, columns), black where the image is smaller; rounded as in torchvision."""
    width, height = image.size
    # pad first, as torchvision: floor for the padding, round half to even for the crop
    if width < columns or height < rows:
        left, top = max(columns - width, 0) // 2, max(rows - height, 0) // 2
        larger = Image.new("RGB", (max(width, columns), max(height, rows)))
        larger.paste(image, (left, top))
        image, (width, height) = larger, larger.size
    left, top = round((width - columns) / 2), round((height - rows) / 2)
    return image.crop((left, top, left + columns, top + rows))
