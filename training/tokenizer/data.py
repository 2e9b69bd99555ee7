"""From a sample of a tar to pixels and caption ids, augmented as published (arXiv 2502.20321, section 4.1).

B batch, S side of the square training image, T text positions.
"""

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.tokenizer.images import load_image

from ..data.tar_index import BadSample, Record
from .config import ImageOptions

EXTENSIONS = ("png", "jpg", "jpeg", "webp")
REMEMBERED = 2**26  # bytes of images that, taken as they are, need to be decoded only once


class Pair(NamedTuple):
    """One image, uint8 (S, S, 3), and its caption ("" where none is learnt)."""

    picture: np.ndarray
    caption: str


class PairDecoder:
    """Decodes records into pairs; a class, so that it reaches spawned workers."""

    def __init__(self, options: ImageOptions, size: int, captions: bool):
        self.options = options
        self.size = size
        self.captions = captions
        self.whole = options.crop_scale == (1.0, 1.0) and options.crop_ratio == (1.0, 1.0)
        self._known: dict[tuple[str, int, int], np.ndarray] = {}

    def __call__(self, record: Record, rng: random.Random) -> Pair:
        """Raises BadSample where image or caption is missing or unreadable."""
        extension = next((e for e in EXTENSIONS if e in record.members), None)
        if extension is None:
            raise BadSample(f"has no image (.{', .'.join(EXTENSIONS)})")
        place = (record.tar, *record.members[extension])
        picture = self._known.get(place)
        if picture is None:
            try:
                image = load_image(record.read(extension))
            except UserError as error:
                raise BadSample(str(error)) from error
            picture = np.asarray(self._crop(image, rng))
            if self.whole and len(self._known) * picture.nbytes < REMEMBERED:
                self._known[place] = picture
        return Pair(picture, self._caption(record, rng) if self.captions else "")

    def _crop(self, image: Image.Image, rng: random.Random) -> Image.Image:
        size = (self.size, self.size)
        if self.whole:
            if image.size == size:
                return image
            left, top, side = (
                (image.width - min(image.size)) / 2,
                (image.height - min(image.size)) / 2,
                min(image.size),
            )
            return image.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        left, top, width, height = crop_box(
            *image.size, self.options.crop_scale, self.options.crop_ratio, rng
        )
        return image.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.BICUBIC)

    def _caption(self, record: Record, rng: random.Random) -> str:
        if self.options.captions == "txt":
            return record.text("txt").strip()
        captions = record.json("json").get("captions")
        if not captions or not all(isinstance(caption, str) for caption in captions):
            raise BadSample('.json has no "captions"')
        return rng.choice(captions)


def crop_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], rng: random.Random
) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a random crop: area share from `scale`, log-uniform aspect from `ratio`.

    Ten tries; then the largest central crop whose aspect is allowed.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, width - w), rng.randint(0, height - h), w, h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (width - w) // 2, (height - h) // 2, w, h


def decoded_first(count: int, share: float) -> tuple[list[int], int]:
    """The places of a micro-batch of `count` images with those to decode in front, and how many these are.

    They stand at equal distances: where `share` of a micro-batch is a whole number, the same images of the
    global batch are decoded however it is split.
    """
    decoded = max(1, math.ceil(round(count * share, 6)))
    chosen = [number * count // decoded for number in range(decoded)]
    return chosen + sorted(set(range(count)) - set(chosen)), decoded


class PairCollate:
    """Pairs -> {"image": uint8 (B, S, S, 3), "token_ids": (B, T) int64 or None}, those to decode first.

    Args:
        share: see `decoded_first`.
    """

    def __init__(self, tokenize: Callable[[list[str]], torch.Tensor] | None, share: float = 1.0):
        self.tokenize = tokenize
        self.share = share

    def __call__(self, pairs: list[Pair]) -> dict[str, Any]:
        pairs = [pairs[place] for place in decoded_first(len(pairs), self.share)[0]]
        captions = [pair.caption for pair in pairs]
        return {
            "image": torch.from_numpy(np.stack([pair.picture for pair in pairs])),
            "token_ids": self.tokenize(captions) if self.tokenize else None,
        }


def to_pixels(picture: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 (B, S, S, 3) -> float (B, 3, S, S) in [-1, 1] on the device."""
    moved = picture.to(device, non_blocking=True).permute(0, 3, 1, 2)
    return moved.float().div_(255).sub_(0.5).div_(0.5)


def grid_image(originals: torch.Tensor, copies: torch.Tensor, columns: int = 8) -> np.ndarray:
    """(B, 3, S, S) pixels twice -> uint8 (2S, columns*S, 3): originals above their reconstructions."""
    rows = [torch.cat(list(images[:columns].detach().float().cpu()), dim=2) for images in (originals, copies)]
    picture = torch.cat(rows, dim=1).clamp(-1, 1).add(1).mul(127.5).round().byte()
    return picture.permute(1, 2, 0).numpy()
