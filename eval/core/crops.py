"""Crops of an image to the tokenizer's input size; published numbers depend on the crop."""

from collections.abc import Callable

import numpy as np
from PIL import Image

from open_unitok.core.errors import UserError, did_you_mean
from open_unitok.tokenizer.images import adm_crop, from_pil, to_pixels

# name -> (RGB image, (H, W) or side) -> pixels (3, H, W) in [-1, 1]; to_pixels(..., "crop") scales the image
# until it just covers the size and cuts out the centre
CROPS: dict[str, Callable] = {
    "bicubic": lambda image, size: to_pixels(image, size, "crop", resample=Image.Resampling.BICUBIC),
    "lanczos": lambda image, size: to_pixels(image, size, "crop", resample=Image.Resampling.LANCZOS),
    "adm": lambda image, size: from_pil(adm_crop(image, size)),
}


def find_crop(name: str) -> Callable:
    """The crop of that name.

    Raises:
        UserError: there is none; the message lists the names.
    """
    if name not in CROPS:
        raise UserError(f"crop is {name!r}." + did_you_mean(name, CROPS))
    return CROPS[name]


def to_uint8_llamagen(pixels: np.ndarray) -> np.ndarray:
    """Pixels in [-1, 1] -> uint8 as class-conditional samplers save them."""
    # truncation of 127.5 x + 128, not the rounding of 127.5 (x + 1)
    return (127.5 * np.asarray(pixels, np.float32) + 128.0).clip(0, 255).astype(np.uint8)
