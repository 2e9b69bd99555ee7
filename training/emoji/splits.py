"""Which emoji are trained and which are held out: chosen once by a seed, frozen in splits.json.

    python -m open_unitok.training.emoji.splits FOLDER ...     # unpacked packages; writes splits.json anew

`unseen` holds emoji that no style trains; `pairs` and `validation` hold (emoji, style) pairs whose emoji is
trained in all other styles, without flags. Held-out emoji exist in all styles. None is a copy of another: a
flag that two territories share would be seen in training under the other name.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.core.files import write_json
from open_unitok.core.text_files import read_json
from open_unitok.tokenizer.images import load_image

from .packages import EMOJI_PACKAGES, STYLES, EmojiImage, package_folders, read_emoji

FROZEN = Path(__file__).with_name("splits.json")
SIZES = (64, 128)  # sides in pixels
SPLITS = ("train", "validation", "pairs", "unseen")
UNSEEN, PAIRS, VALIDATION = 95, 400, 250
FLAGS = "Flags"  # the category without pairs: a flag differs little between styles
COPY_PSNR = 30.0  # dB: images of one style that are this close, mirrored or not, show the same
_THUMBNAIL = 32  # side at which they are compared


def load_frozen(path: Path = FROZEN) -> dict[str, Any]:
    """Lists of held-out emoji and pairs by split, and hashes of the sources and pixels."""
    return read_json(path)


def split_of(image: EmojiImage, frozen: Mapping[str, Any]) -> str:
    """The split of an image, one of `SPLITS`."""
    if image.emoji.code in frozen["unseen"]:
        return "unseen"
    return next((split for split in ("pairs", "validation") if image.key in frozen[split]), "train")


def render_emoji(file: Path, size: int) -> Image.Image:
    """An emoji on white as an RGB square of `size` pixels; the few that are not square get white borders."""
    image = load_image(file)
    side = max(image.size)
    if image.size != (side, side):
        canvas = Image.new("RGB", (side, side), "white")
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = canvas
    return image if side == size else image.resize((size, size), Image.Resampling.BICUBIC)


# ---- hashes ------------------------------------------------------------------------------------------------


def source_hashes(images: Iterable[EmojiImage]) -> dict[str, str]:
    """Style -> sha256 over names, labels and contents of its files."""
    hashes: dict[str, Any] = {}
    for image in images:
        hashes.setdefault(image.style, hashlib.sha256())
        hashes[image.style].update(f"{image.key}\n{'|'.join(image.emoji)}\n".encode())
        hashes[image.style].update(hashlib.sha256(image.file.read_bytes()).digest())
    return {style: value.hexdigest() for style, value in hashes.items()}


def pixel_hash(digests: Mapping[str, bytes]) -> str:
    """sha256 over the keys and pixel digests of a split, in the order of the keys."""
    return hashlib.sha256(b"".join(key.encode() + digests[key] for key in sorted(digests))).hexdigest()


def check_sources(images: Sequence[EmojiImage], frozen: Mapping[str, Any], styles: Iterable[str]) -> None:
    """Compare the images of each of `styles` with those that the splits were made of.

    Raises:
        UserError: a style has other images, or none.
    """
    hashes = source_hashes(images)
    for style in styles:
        if hashes.get(style) != frozen["sources"][style]:
            package = STYLES[style]
            count = sum(image.style == style for image in images)
            raise UserError(
                f"The {count:,} images of {package.name} are not those of version {package.version} as npm "
                f"gives it ({frozen['images'][style]:,}): fetch it again, npm pack {package.spec}."
            )


# ---- choice ------------------------------------------------------------------------------------------------


def choose_splits(
    images: Sequence[EmojiImage],
    alike: frozenset[str] = frozenset(),
    seed: int = 0,
    counts: tuple[int, int, int] = (UNSEEN, PAIRS, VALIDATION),
) -> dict[str, list[str]]:
    """The held-out emoji (codes) and pairs (keys) by split.

    Args:
        alike: codes that must be trained, see `lookalikes`.
        counts: of unseen emoji, test pairs and validation pairs.
    """
    styles: dict[str, set[str]] = {}
    for image in images:
        styles.setdefault(image.emoji.code, set()).add(image.style)
    emoji = {image.emoji.code: image.emoji for image in images}
    names = Counter(e.name for e in emoji.values())
    candidates = sorted(
        code
        for code, e in emoji.items()
        # one name for two emoji: a caption would tell of the other
        if styles[code] == set(STYLES) and names[e.name] == 1 and code not in alike
    )
    rng = Random(f"{seed}/emoji")
    rng.shuffle(candidates)
    unseen, rest = candidates[: counts[0]], candidates[counts[0] :]
    rest = [code for code in rest if emoji[code].category != FLAGS]
    pairs = [f"{rng.choice(list(STYLES))}-{code}" for code in rest[: counts[1] + counts[2]]]
    if len(unseen) < counts[0] or len(pairs) < counts[1] + counts[2]:
        raise UserError(f"Only {len(candidates)} emoji can be held out: {sum(counts)} are wanted.")
    return {
        "unseen": sorted(unseen),
        "pairs": sorted(pairs[: counts[1]]),
        "validation": sorted(pairs[counts[1] :]),
    }


def lookalikes(images: Sequence[EmojiImage]) -> frozenset[str]:
    """Codes of emoji that look like another one of the same style, mirrored or not, in any style."""
    found: set[str] = set()
    limit = 255**2 / 10 ** (COPY_PSNR / 10) * 3 * _THUMBNAIL**2  # sum of squared differences
    for style in STYLES:
        group = [image for image in images if image.style == style]
        squares = [np.asarray(render_emoji(image.file, _THUMBNAIL), np.float32) for image in group]
        rows = np.stack(squares).reshape(len(group), -1)
        mirrored = np.stack([square[:, ::-1] for square in squares]).reshape(len(group), -1)
        norms = (rows**2).sum(axis=1)
        for others in (rows, mirrored):
            gaps = norms[:, None] + norms[None, :] - 2 * rows @ others.T
            np.fill_diagonal(gaps, np.inf)
            found |= {group[i].emoji.code for i in np.flatnonzero((gaps < limit).any(axis=1))}
    return frozenset(found)


def freeze(folders: Mapping[str, Path], counts: tuple[int, int, int], sizes: Sequence[int]) -> dict[str, Any]:
    """The content of splits.json for unpacked packages."""
    images = read_emoji(dict(folders))
    frozen: dict[str, Any] = {
        "packages": {package.style: package.spec for package in EMOJI_PACKAGES},
        "images": dict(Counter(image.style for image in images)),
        "sources": source_hashes(images),
        **choose_splits(images, lookalikes(images), counts=counts),
    }
    digests = {(size, split): {} for size in sizes for split in SPLITS}
    for image in images:
        for size in sizes:
            pixels = render_emoji(image.file, size).tobytes()
            digests[size, split_of(image, frozen)][image.key] = hashlib.sha256(pixels).digest()
    frozen["splits"] = {split: len(digests[sizes[0], split]) for split in SPLITS}
    frozen["pixels"] = {
        str(size): {split: pixel_hash(digests[size, split]) for split in SPLITS} for size in sizes
    }
    return frozen


if __name__ == "__main__":
    with package_folders(sys.argv[1:]) as unpacked:
        write_json(FROZEN, freeze(unpacked, (UNSEEN, PAIRS, VALIDATION), SIZES))
