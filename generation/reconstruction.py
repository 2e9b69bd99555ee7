"""Reconstruction of images: encode with the visual tokenizer, then decode the codes."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image

from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.images import ImageSource, load_image, to_pil, to_pixels

from .validation import check_whole


@torch.no_grad()
def iter_reconstructions(
    unitok: UniTok, images: Sequence[ImageSource], batch_size: int = 16, size: int | None = None
) -> Iterator[tuple[Image.Image, Image.Image]]:
    """Yield (cropped original, reconstruction) per image.

    Args:
        size: side in pixels of a square crop; None = the shape of the training images.

    Raises:
        UserError: a file is missing or not an image; the size is not a multiple of the patch size.
    """
    shape = unitok.config.image_shape if size is None else (size, size)
    check_whole("size", shape[0])
    check_whole("batch_size", batch_size)
    for batch in split_batches(images, batch_size):
        pixels = torch.stack([to_pixels(load_image(image, needed=shape), shape) for image in batch])
        decoded = unitok.reconstruct(pixels.to(unitok.device)).float().cpu()
        yield from ((to_pil(original), to_pil(image)) for original, image in zip(pixels, decoded))


def split_batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """The items in batches of `size`, the last one shorter."""
    return (items[i : i + size] for i in range(0, len(items), size))
