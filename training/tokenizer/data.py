"""Data of the tokenizer stage: samples of tars to pixels and caption ids, with the published augmentation
(arXiv 2502.20321, section 4.1).

B batch, H and W rows and columns of a training image, T text positions.
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

from ..core.options import ShardOptions
from ..data.captions import with_captions
from ..data.records import caption_texts
from ..data.shards import ShardStream
from ..data.tar_index import BadSample, TarSample, image_members
from .config import ImageOptions

CACHE_BYTES = 2**26  # of decoded images that are cached in runs without random crops


class Pair(NamedTuple):
    """One image, uint8 (H, W, 3), and its caption ("" without the contrastive loss)."""

    image: np.ndarray
    caption: str


def build_pair_stream(
    shards: ShardOptions,
    images: ImageOptions,
    image_shape: tuple[int, int],
    captions: bool,
    seed: int,
    micro_batch: int,
    rank: int = 0,
    ranks: int = 1,
) -> ShardStream:
    """The endless stream of pairs of one rank."""
    decoder = PairDecoder(images, image_shape, captions)
    return ShardStream(shards, decoder, seed=seed, micro_batch=micro_batch, rank=rank, ranks=ranks)


class PairDecoder:
    """Decodes records into pairs of image and caption; a class, because spawned workers pickle it."""

    def __init__(self, options: ImageOptions, image_shape: tuple[int, int], captions: bool):
        self.options = options
        self.height, self.width = image_shape
        self.captions = captions
        self.whole = options.crop_scale == (1.0, 1.0) and options.crop_ratio == (1.0, 1.0)
        if 2 * options.shift >= min(image_shape):
            height, width = image_shape
            raise UserError(
                f"images.shift is {options.shift}: it must be less than half of a side of the model's "
                f"{width} x {height} pixels."
            )
        self.needed = self._needed()
        self._cache: dict[tuple[str, int, int], np.ndarray] = {}

    def __call__(self, record: TarSample, rng: random.Random) -> Pair:
        """Raises BadSample if image or caption is missing or unreadable."""
        members, info = image_members(record)
        if len(members) != 1:
            raise BadSample(f"has {len(members)} images, expected one")
        extension = members[0]
        # without random crops an image decodes to the same pixels in every epoch
        key = (record.tar, *record.members[extension])
        pixels = self._cache.get(key)
        if pixels is None:
            try:
                image = load_image(record.read(extension), needed=self.needed)
            except UserError as error:
                raise BadSample(str(error)) from error
            pixels = np.asarray(self._crop(image, rng))
            if self.whole and len(self._cache) * pixels.nbytes < CACHE_BYTES:
                self._cache[key] = pixels
        if self.options.shift:
            pixels = shift_image(pixels, self.options.shift, rng)
        return Pair(pixels, self._caption(record, info, rng) if self.captions else "")

    def _needed(self) -> tuple[int, int]:
        """(H, W) from which on no random crop is smaller than a training image."""
        area, (low, high) = self.options.crop_scale[0], self.options.crop_ratio
        aspect = self.width / self.height
        # in a square of side s, crops are s * sqrt(area * aspect) wide and s * sqrt(area / aspect) high
        narrow = self.width / math.sqrt(area * low * aspect)
        flat = self.height / math.sqrt(area / (high * aspect))
        side = math.ceil(max(self.width, self.height, narrow, flat))
        return side, side

    def _crop(self, image: Image.Image, rng: random.Random) -> Image.Image:
        size = width, height = self.width, self.height
        if self.whole:
            if image.size == size:
                return image
            # the largest central box of the model's aspect ratio
            wide = image.width * height > image.height * width
            box_width = image.height * width / height if wide else image.width
            box_height = image.height if wide else image.width * height / width
            left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
            box = (left, top, left + box_width, top + box_height)
            return image.resize(size, Image.Resampling.BICUBIC, box=box)
        # crop_ratio is relative to the model's aspect ratio
        low, high = (ratio * width / height for ratio in self.options.crop_ratio)
        left, top, w, h = crop_box(*image.size, self.options.crop_scale, (low, high), rng)
        return image.crop((left, top, left + w, top + h)).resize(size, Image.Resampling.BICUBIC)

    def _caption(self, record: TarSample, info: dict[str, Any], rng: random.Random) -> str:
        choice = self.options.captions
        if choice == "txt":
            captions = [record.text("txt")]
        else:
            captions = caption_texts(info if choice == "json" else with_captions(record, info, choice))
        captions = [caption.strip() for caption in captions if caption.strip()]
        if not captions:
            raise BadSample(
                f"has no caption, images.captions is {choice!r} (it has .{', .'.join(record.members)})"
            )
        # `rng` is keyed by the epoch: an image has another caption in each
        return rng.choice(captions)


def crop_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], rng: random.Random
) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a random crop: area share from `scale`, log-uniform aspect from `ratio`.

    After ten failed attempts, the largest central crop whose aspect is allowed.
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


def shift_image(pixels: np.ndarray, limit: int, rng: random.Random) -> np.ndarray:
    """(H, W, 3) moved by up to `limit` pixels down or up and right or left; edge pixels are repeated."""
    padded = np.pad(pixels, ((limit, limit), (limit, limit), (0, 0)), mode="edge")
    top, left = rng.randint(0, 2 * limit), rng.randint(0, 2 * limit)
    return padded[top : top + pixels.shape[0], left : left + pixels.shape[1]]


def order_decoded_first(count: int, share: float) -> tuple[list[int], int]:
    """The order of a micro-batch of `count` images with those to decode first, and their number.

    Decoded images are equally spaced: if `share` of a micro-batch is a whole number, the same images of the
    global batch are decoded however it is split.
    """
    # rounding first: 100 * 0.07 is 7.000000000000001
    decoded = max(1, math.ceil(round(count * share, 6)))
    chosen = [number * count // decoded for number in range(decoded)]
    return chosen + sorted(set(range(count)) - set(chosen)), decoded


class PairCollate:
    """Pairs -> {"image": uint8 (B, H, W, 3), "token_ids": (B, T) int64 or None}; images to decode come first.

    Args:
        share: see `order_decoded_first`.
    """

    def __init__(self, tokenize: Callable[[list[str]], torch.Tensor] | None, share: float = 1.0):
        self.tokenize = tokenize
        self.share = share

    def __call__(self, pairs: list[Pair]) -> dict[str, Any]:
        pairs = [pairs[position] for position in order_decoded_first(len(pairs), self.share)[0]]
        captions = [pair.caption for pair in pairs]
        return {
            "image": torch.from_numpy(np.stack([pair.image for pair in pairs])),
            "token_ids": self.tokenize(captions) if self.tokenize else None,
        }


def pixels_from_uint8(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1] on the device."""
    moved = images.to(device, non_blocking=True).permute(0, 3, 1, 2)
    return moved.float().div_(255).sub_(0.5).div_(0.5)


def reconstruction_grid(pixels: torch.Tensor, reconstruction: torch.Tensor, columns: int = 8) -> np.ndarray:
    """uint8 (2H, columns*W, 3): the first originals above their reconstructions, of which there may be fewer.

    Args:
        pixels, reconstruction: (B, 3, H, W) and (b, 3, H, W); the first images of both belong together.
    """
    columns = min(columns, len(pixels), len(reconstruction))
    rows = [
        torch.cat(list(images[:columns].detach().float().cpu()), dim=2) for images in (pixels, reconstruction)
    ]
    # originals above reconstructions; [-1, 1] -> [0, 255]
    grid = torch.cat(rows, dim=1).clamp(-1, 1).add(1).mul(127.5).round().byte()
    return grid.permute(1, 2, 0).numpy()
