"""Images to pixels in [-1, 1] and back (the preprocessing of published UniTok's scripts)."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import torch
from PIL import Image

from open_unitok.core.errors import UserError, did_you_mean

MAX_PIXELS = 178_956_970  # a file that unpacks to more is taken for an attack, as Pillow does
PAD_COLOUR = (122, 116, 104)  # CLIP's mean colour, around images that are padded to a square
MODES = ("crop", "pad", "squash")
# what Pillow's readers raise on bytes that only look like an image
BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, AttributeError,
    RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip

ImageSource = str | os.PathLike[str] | bytes | Image.Image


def load_image(picture: ImageSource) -> Image.Image:
    """An image file, its bytes, or a PIL image -> an RGB PIL image.

    Raises:
        UserError: no image can be read; the message names the file.
    """
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    if not isinstance(picture, (bytes, str, os.PathLike)):
        kind = type(picture).__name__
        raise UserError(f"No {kind} can be read as an image: give a file's path, its bytes or a PIL image.")
    name = "The given bytes" if isinstance(picture, bytes) else str(picture)
    if not isinstance(picture, bytes) and not os.path.isfile(picture):
        raise UserError(f"{name} is no file.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UserError(f"{name} has {image.width} x {image.height} pixels: too many to unpack.")
                return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} has too many pixels to unpack: {error}") from error
    except UserError:
        raise
    except BROKEN as error:
        raise UserError(f"{name} is no image that can be read: {error}") from error


def to_pixels(
    image: Image.Image,
    size: int,
    mode: str = "crop",
    resize: int | None = None,
    resample: Image.Resampling | None = None,
) -> torch.Tensor:
    """An RGB image -> (3, size, size) float32 in [-1, 1].

    Args:
        mode: "crop" scales the shorter side to `resize` and cuts out the middle; "pad" puts the image in
            the middle of a square of `PAD_COLOUR` and scales that; "squash" scales both sides on their own.
        resize: for "crop": the shorter side in pixels; None = `size`, 0 = as it is (missing parts are black).
        resample: Pillow's filter; None = bicubic for "crop", else bilinear, as published.

    Raises:
        UserError: there is no such mode; the image is so long and thin that its square would not fit.
    """
    if mode not in MODES:
        raise UserError(f"mode = {mode!r}." + did_you_mean(mode, MODES))
    if mode == "crop":
        longer, shorter = max(image.size), min(image.size)
        side = shorter if resize == 0 else resize or size
        _check_pixels(image, max(side, size) * max(longer * side // shorter, size))
        image = _scale_shorter(
            image, size if resize is None else resize, resample or Image.Resampling.BICUBIC
        )
        return from_pil(_centre_crop(image, size))
    if mode == "pad":
        image = pad_to_square(image)
    return from_pil(image.resize((size, size), resample or Image.Resampling.BILINEAR))


def pad_to_square(image: Image.Image, colour: tuple[int, int, int] = PAD_COLOUR) -> Image.Image:
    """The image in the middle of a square of its longer side.

    Raises:
        UserError: it is so long and thin that the square would not fit.
    """
    width, height = image.size
    side = max(width, height)
    if width == height:
        return image
    _check_pixels(image, side * side)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _check_pixels(image: Image.Image, pixels: int) -> None:
    if pixels > MAX_PIXELS:  # a few kilobytes of 1 x 100,000,000 pixels would else become a petabyte
        raise UserError(
            f"The image has {image.width} x {image.height} pixels: as a square it would have more than "
            f"{MAX_PIXELS:,}. Crop it."
        )


def from_pil(image: Image.Image) -> torch.Tensor:
    """An RGB image, as it is -> (3, H, W) float32 in [-1, 1]."""
    array = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    return (array.float() / 255 - 0.5) / 0.5


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels of any shape in [-1, 1] -> 0 to 255, rounded (half to even) and clamped; NaN is grey."""
    return ((pixels.float().nan_to_num(0.0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(pixels: torch.Tensor) -> Image.Image:
    """(3, H, W) pixels in [-1, 1] -> an RGB image."""
    return Image.fromarray(to_uint8(pixels.detach()).permute(1, 2, 0).cpu().contiguous().numpy())


def _scale_shorter(image: Image.Image, side: int, resample: Image.Resampling) -> Image.Image:
    """Scale so that the shorter side is `side`; the longer one is rounded down, as torchvision does."""
    width, height = image.size
    if side == 0 or min(width, height) == side:
        return image
    if width <= height:
        return image.resize((side, int(side * height / width)), resample)
    return image.resize((int(side * width / height), side), resample)


def _centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle (size, size); black where the image is smaller. An odd rest goes as in torchvision."""
    width, height = image.size
    if width < size or height < size:
        left, top = max(size - width, 0) // 2, max(size - height, 0) // 2
        larger = Image.new("RGB", (max(width, size), max(height, size)))
        larger.paste(image, (left, top))
        image, (width, height) = larger, larger.size
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB of two images of one size; infinite where they are equal."""
    error = float(np.mean((np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))
