"""Scenes of coloured shapes: sampling and rendering.

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
class SceneObject:
    """One object of a scene."""

    shape: str
    color: str
    size: float  # side of the bounding box
    cell: tuple[int, int]  # row, column
    shift: tuple[float, float] = (0.0, 0.0)  # x, y offset from the cell's centre
    texture: str = "plain"
    size_name: str = ""

    @property
    def pair(self) -> tuple[str, str]:
        """(colour, shape)."""
        return self.color, self.shape

    @property
    def name(self) -> str:
        """The object's full name in text, such as "red circle" or "small striped red circle"."""
        return " ".join(self.words)

    @property
    def words(self) -> list[str]:
        """The words for its size, texture, colour and shape; plain objects have none for their texture."""
        texture = "" if self.texture == "plain" else self.texture
        return [word for word in (self.size_name, texture, *self.pair) if word]


@dataclass(frozen=True)
class Scene:
    """Objects in reading order on a light background."""

    size: int
    grid: int
    objects: tuple[SceneObject, ...]
    background: tuple[int, int, int]
    gradient: tuple[int, int] = (0, 0)  # change of all three channels across the image, along x and along y

    def as_json(self) -> dict[str, Any]:
        """Ground truth for data files: attributes, cell and bounding box of each object."""
        objects = []
        for obj in self.objects:
            x, y = object_centre(obj, self.size // self.grid)
            half = obj.size / 2
            objects.append(
                {
                    "shape": obj.shape,
                    "color": obj.color,
                    "texture": obj.texture,
                    "size": obj.size,
                    "size_name": obj.size_name,
                    "cell": list(obj.cell),
                    "box": [x - half, y - half, x + half, y + half],
                }
            )
        return {"objects": objects, "background": list(self.background), "gradient": list(self.gradient)}


def object_centre(obj: SceneObject, cell: int) -> tuple[float, float]:
    """x, y of an object's centre, in pixels from the image's top left corner."""
    return (obj.cell[1] + 0.5) * cell + obj.shift[0], (obj.cell[0] + 0.5) * cell + obj.shift[1]


def sample_scene(config: SceneConfig, split: str, index: int) -> Scene:
    """Scene `index` of "train", "validation" or "test": a pure function of seed, split and index.

    A hash reserves arrangements (all but the background) for evaluation: training has none of them, and no
    held-out colour x shape pair.
    """
    rng, train = Random(f"{config.seed}/{split}/{index}"), split == "train"
    pairs = [p for p in config.pairs if p not in config.held_out_pairs] if train else config.pairs
    while True:  # rejection sampling: until the arrangement belongs to the split
        counts = range(config.min_objects, config.max_objects + 1)
        # training prefers many objects: positions are learned from scenes with several
        count = rng.choices(counts, weights=counts)[0] if train else rng.choice(counts)
        scene = _sample_arrangement(config, rng, pairs, count)
        if reserved_for_evaluation(config, scene) != train:
            return scene


def reserved_for_evaluation(config: SceneConfig, scene: Scene) -> bool:
    """Whether this arrangement of objects never occurs in training."""
    # The hash is of the dataclass's repr with its former class name: existing data sets depend on it.
    arrangement = repr((config.seed, scene.objects)).replace("SceneObject(", "Thing(")
    digest = hashlib.sha256(arrangement.encode()).digest()
    return int.from_bytes(digest[:8], "big") < config.test_share * 2**64


def _sample_arrangement(config: SceneConfig, rng: Random, pairs: list[tuple[str, str]], count: int) -> Scene:
    # pairs and shapes repeat on purpose: questions about counts and attributes need such scenes
    chosen = [rng.choice(pairs)]
    while len(chosen) < count:
        sample, (color, shape) = rng.random(), rng.choice(chosen)
        if sample < 0.2:  # an identical pair, so that counts above one occur
            chosen.append((color, shape))
        elif sample < 0.35:  # the same shape in any colour
            chosen.append(rng.choice([p for p in pairs if p[1] == shape]))
        else:
            chosen.append(rng.choice(pairs))
    cells = sorted(rng.sample([(r, c) for r in range(config.grid) for c in range(config.grid)], count))
    rng.shuffle(chosen)
    objects = tuple(_sample_object(config, rng, pair, cell) for pair, cell in zip(chosen, cells))
    red, green, blue = (rng.randint(config.light_min, config.light_max) for _ in range(3))
    along_x, along_y = (
        rng.randint(-config.gradient, config.gradient) if config.gradient else 0 for _ in range(2)
    )
    return Scene(config.size, config.grid, objects, (red, green, blue), (along_x, along_y))


def _sample_object(
    config: SceneConfig, rng: Random, pair: tuple[str, str], cell: tuple[int, int]
) -> SceneObject:
    which, steps = rng.randrange(len(config.sizes)), math.floor(config.jitter / config.step)
    return SceneObject(
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
    """The image of a scene as (size, size, 3) uint8: anti-aliased shapes on the background."""
    cell = scene.size // scene.grid
    image = np.empty((scene.size, scene.size, 3), np.float32)
    image[:] = scene.background
    if any(scene.gradient):
        ramp = (np.arange(scene.size, dtype=np.float32) + 0.5) / scene.size - 0.5
        image += (scene.gradient[0] * ramp[None, :] + scene.gradient[1] * ramp[:, None])[..., None]
    for obj in scene.objects:
        # alpha compositing inside the object's cell: objects never leave it
        alpha = coverage(obj.shape, obj.texture, obj.size, obj.shift, cell)[..., None]
        top, left = obj.cell[0] * cell, obj.cell[1] * cell
        patch = image[top : top + cell, left : left + cell]
        patch += alpha * (np.array(COLORS[obj.color], np.float32) - patch)
    return np.rint(image.clip(0, 255)).astype(np.uint8)
