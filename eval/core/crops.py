"""How an image of any size comes to the tokenizer's square; published numbers differ in it."""

from collections.abc import Callable

import numpy as np
from PIL import Image

from open_unitok.core.errors import UserError, did_you_mean


def adm_crop(image: Image.Image, size: int) -> Image.Image:
    """The square that ADM's and LlamaGen's ImageNet references are cut to: halved by boxes, then bicubic."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def by(resample: Image.Resampling) -> Callable:
    """Shorter side to the size, then the middle."""
    from open_unitok.tokenizer.images import to_pixels

    return lambda image, size: to_pixels(image, size, "crop", resample=resample)


def adm(image: Image.Image, size: int):
    """`adm_crop` as pixels."""
    from open_unitok.tokenizer.images import from_pil

    return from_pil(adm_crop(image, size))


# name -> what makes the function (RGB image, size) -> pixels (3, size, size)
CROPS: dict[str, Callable[[], Callable]] = {
    "bicubic": lambda: by(Image.Resampling.BICUBIC),
    "lanczos": lambda: by(Image.Resampling.LANCZOS),
    "adm": lambda: adm,
}


def find_crop(name: str) -> Callable:
    """The function of that name, or a UserError with what there is."""
    if name not in CROPS:
        raise UserError(f"crop is {name!r}." + did_you_mean(name, CROPS))
    return CROPS[name]()


def to_uint8_llamagen(pixels: np.ndarray) -> np.ndarray:
    """Pixels in [-1, 1] -> uint8 by cutting off 127.5 x + 128, as class-conditional samplers save them."""
    return (127.5 * np.asarray(pixels, np.float32) + 128.0).clip(0, 255).astype(np.uint8)
