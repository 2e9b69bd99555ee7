"""Crops of an image to the tokenizer's square; published numbers differ in it."""

from collections.abc import Callable

import numpy as np
from PIL import Image

from open_unitok.core.errors import UserError, did_you_mean
from open_unitok.tokenizer.images import from_pil, to_pixels


def adm_crop(image: Image.Image, size: int) -> Image.Image:
    """The square of ADM's and LlamaGen's ImageNet references: halved by box filters, then bicubic."""
    # the published crop halves with box filters before its bicubic step
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


# name -> (RGB image, size) -> pixels (3, size, size) in [-1, 1]; to_pixels(..., "crop") scales the shorter
# side to the size and cuts the centre
CROPS: dict[str, Callable] = {
    "bicubic": lambda image, size: to_pixels(image, size, "crop", resample=Image.Resampling.BICUBIC),
    "lanczos": lambda image, size: to_pixels(image, size, "crop", resample=Image.Resampling.LANCZOS),
    "adm": lambda image, size: from_pil(adm_crop(image, size)),
}


def find_crop(name: str) -> Callable:
    """The crop of that name, or a UserError with the allowed names."""
    if name not in CROPS:
        raise UserError(f"crop is {name!r}." + did_you_mean(name, CROPS))
    return CROPS[name]


def to_uint8_llamagen(pixels: np.ndarray) -> np.ndarray:
    """Pixels in [-1, 1] -> uint8 by truncating 127.5 x + 128, as class-conditional samplers save them."""
    return (127.5 * np.asarray(pixels, np.float32) + 128.0).clip(0, 255).astype(np.uint8)
