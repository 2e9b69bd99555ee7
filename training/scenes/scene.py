"""A scene of coloured shapes: how one is drawn by lot, and how it becomes an image.

A scene is data; its image is a pure function of it. Lengths are pixels, x to the right and y downwards.
"""

import hashlib
import math
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from .config import SceneConfig
from .shapes import COLORS, coverage


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    shape: str
    color: str
    size: float
    cell: tuple[int, int]  # row, column
    shift: tuple[float, float] = (0.0, 0.0)  # x, y from the middle of the cell
    texture: str = "plain"
    size_name: str = ""

    @property
    def pair(self) -> tuple[str, str]:
        return self.color, self.shape

    @property
    def name(self) -> str:
        """How the object is called in text, such as "red circle" or "small striped red circle"."""
        return " ".join(
            w for w in (self.size_name, self.texture * (self.texture != "plain"), *self.pair) if w
        )


@dataclass(frozen=True)
class Scene:
    """Objects, in reading order, before a light background."""

    size: int
    grid: int
    things: tuple[Thing, ...]
    background: tuple[int, int, int]
    gradient: tuple[int, int] = (0, 0)  # change of all three channels across the image, along x and along y

    def as_json(self) -> dict[str, Any]:
        objects = []
        for thing in self.things:
            x, y = centre(thing, self.size // self.grid)
            half = thing.size / 2
            objects.append(
                {
                    "shape": thing.shape,
                    "color": thing.color,
                    "texture": thing.texture,
                    "size": thing.size,
                    "size_name": thing.size_name,
                    "cell": list(thing.cell),
                    "box": [x - half, y - half, x + half, y + half],
                }
            )
        return {"objects": objects, "background": list(self.background), "gradient": list(self.gradient)}


def centre(thing: Thing, cell: int) -> tuple[float, float]:
    """x, y of the middle of an object, in pixels from the image's top left corner."""
    return (thing.cell[1] + 0.5) * cell + thing.shift[0], (thing.cell[0] + 0.5) * cell + thing.shift[1]


def sample_scene(config: SceneConfig, split: str, index: int) -> Scene:
    """Scene `index` of "train" or "test": a pure function of the configuration's seed and the two.

    Each arrangement (all but the background) belongs to one split, by its hash, so the splits share none.
    Held-out colour x shape pairs are found in "test" alone.
    """
    rng = Random(f"{config.seed}/{split}/{index}")
    pairs = config.pairs if split == "test" else [p for p in config.pairs if p not in config.held_out_pairs]
    while True:
        counts = range(config.min_objects, config.max_objects + 1)
        # training shows full images more often: what stands where is learnt from several objects
        count = rng.choice(counts) if split == "test" else rng.choices(counts, weights=counts)[0]
        scene = _draw(config, rng, pairs, count)
        if in_test(config, scene) == (split == "test"):
            return scene


def in_test(config: SceneConfig, scene: Scene) -> bool:
    """Whether this arrangement of objects is kept for the test split."""
    digest = hashlib.sha256(repr((config.seed, scene.things)).encode()).digest()
    return int.from_bytes(digest[:8], "big") < config.test_share * 2**64


def _draw(config: SceneConfig, rng: Random, pairs: list[tuple[str, str]], count: int) -> Scene:
    chosen = [rng.choice(pairs)]
    while len(chosen) < count:
        lot, (color, shape) = rng.random(), rng.choice(chosen)
        if lot < 0.2:  # twins, so that there is something to count
            chosen.append((color, shape))
        elif lot < 0.35:
            chosen.append(rng.choice([p for p in pairs if p[1] == shape]))
        else:
            chosen.append(rng.choice(pairs))
    cells = sorted(rng.sample([(r, c) for r in range(config.grid) for c in range(config.grid)], count))
    rng.shuffle(chosen)
    things = tuple(_thing(config, rng, pair, cell) for pair, cell in zip(chosen, cells))
    background = tuple(rng.randint(config.light_min, config.light_max) for _ in range(3))
    gradient = tuple(
        rng.randint(-config.gradient, config.gradient) if config.gradient else 0 for _ in range(2)
    )
    return Scene(config.size, config.grid, things, background, gradient)  # type: ignore[arg-type]


def _thing(config: SceneConfig, rng: Random, pair: tuple[str, str], cell: tuple[int, int]) -> Thing:
    which, steps = rng.randrange(len(config.sizes)), math.floor(config.jitter / config.step)
    return Thing(
        shape=pair[1],
        color=pair[0],
        size=config.sizes[which],
        cell=cell,
        shift=(rng.randint(-steps, steps) * config.step, rng.randint(-steps, steps) * config.step),
        texture=rng.choice(config.textures),
        size_name=config.size_names[which] if config.size_names else "",
    )


def render(scene: Scene) -> Image.Image:
    """The image of a scene, `size` x `size`, RGB."""
    return Image.fromarray(render_array(scene))


def render_array(scene: Scene) -> np.ndarray:
    """The image of a scene as (size, size, 3) uint8: anti-aliased shapes over the background."""
    cell = scene.size // scene.grid
    image = np.empty((scene.size, scene.size, 3), np.float32)
    image[:] = scene.background
    if any(scene.gradient):
        ramp = (np.arange(scene.size, dtype=np.float32) + 0.5) / scene.size - 0.5
        image += (scene.gradient[0] * ramp[None, :] + scene.gradient[1] * ramp[:, None])[..., None]
    for thing in scene.things:
        cover = coverage(thing.shape, thing.texture, thing.size, thing.shift, cell)[..., None]
        top, left = thing.cell[0] * cell, thing.cell[1] * cell
        patch = image[top : top + cell, left : left + cell]
        patch += cover * (np.array(COLORS[thing.color], np.float32) - patch)
    return np.rint(image.clip(0, 255)).astype(np.uint8)
