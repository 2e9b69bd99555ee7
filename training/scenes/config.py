"""The settings of a set of scenes, checked when they are made."""

import dataclasses
import functools
import math
from dataclasses import dataclass, fields, replace
from random import Random
from typing import Any

from open_unitok.core.errors import UserError, did_you_mean

from .shapes import COLORS, SHAPES, TEXTURES


def _told(default: Any, what: str) -> Any:
    """A field that says in `unitok data scenes --help` what it is."""
    return dataclasses.field(default=default, metadata={"help": what})


@dataclass(frozen=True)
class SceneConfig:
    """What the scenes may hold and how many are made. The defaults are the demo's."""

    size: int = _told(32, "image side in pixels")
    grid: int = _told(2, "cells per side; an object stays inside its cell")
    min_objects: int = _told(1, "fewest objects in a scene")
    max_objects: int = _told(2, "most objects in a scene")
    shapes: int = _told(4, "how many shapes there are")
    colors: int = _told(6, "how many colours there are")
    sizes: tuple[float, ...] = _told((10, 11, 12), "side of an object's box in pixels")
    size_names: tuple[str, ...] = _told((), "one per size, to be named in captions and questions; or none")
    textures: tuple[str, ...] = _told(("plain",), "how objects are filled: plain, striped, dotted")
    jitter: float = _told(1.0, "largest shift of an object from the middle of its cell, pixels")
    step: float = _told(1.0, "shifts are multiples of this, pixels")
    light_min: int = _told(222, "a background's red, green and blue are this at least")
    light_max: int = _told(250, "a background's red, green and blue are this at most")
    gradient: int = _told(0, "largest change of the background across the image, levels of 255")
    held_out: float = _told(0.1, "share of colour x shape pairs that training never shows")
    test_share: float = _told(0.1, "share of all possible arrangements that only the test split may use")
    train: int = _told(20_000, "training scenes")
    test: int = _told(1_000, "test scenes")
    shard: int = _told(2_000, "training scenes per tar")
    corners: bool = _told(False, 'captions also say "in the top left corner"')
    captions: int = _told(4, "captions per scene")
    conversations: int = _told(4, "conversations per training scene")
    turns: int = _told(4, "most questions in one conversation")
    asked: tuple[float, ...] = _told(
        (3, 1, 1, 1, 1, 3),
        "how often training asks for existence, count, colour, shape, position, relation: their shares",
    )
    short_names: bool = _told(
        False, "training also asks where things are by a part of their names, and for one relation at a time"
    )
    pair_captions: int = _told(0, "further captions of training scenes of two objects")
    questions: int = _told(4, "questions per test scene")
    pope: int = _told(150, "test scenes asked about in each POPE category, two questions each")
    prompts: int = _told(25, "prompts per GenEval tag")
    text_lines: int = _told(4_000, "lines of plain text")
    vocabulary: int = _told(512, "pieces of the text tokenizer, 259 of which are bytes and controls")
    seed: int = _told(0, "of everything that is drawn by lot")

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_type(field.name, getattr(self, field.name), field.default)
        # 10 and 10.0 are one setting, and must give one set of scenes
        object.__setattr__(self, "sizes", tuple(map(float, self.sizes)))
        object.__setattr__(self, "asked", tuple(map(float, self.asked)))
        for name in ("jitter", "step", "held_out", "test_share"):
            object.__setattr__(self, name, float(getattr(self, name)))
        _require(self.grid in (2, 3), "grid", self.grid, "2 or 3")
        _require(
            16 <= self.size <= 1024 and self.size % self.grid == 0,
            "size",
            self.size,
            "a multiple of grid, 16 to 1024",
        )
        _require(
            1 <= self.min_objects <= self.max_objects, "min_objects", self.min_objects, "1 to max_objects"
        )
        _require(
            self.max_objects <= min(self.grid**2, 6),
            "max_objects",
            self.max_objects,
            "at most one per cell, 6 in all",
        )
        _require(2 <= self.shapes <= len(SHAPES), "shapes", self.shapes, f"2 to {len(SHAPES)}")
        _require(2 <= self.colors <= len(COLORS), "colors", self.colors, f"2 to {len(COLORS)}")
        _require(
            bool(self.sizes) and min(self.sizes) >= 4, "sizes", self.sizes, "a list of at least 4 pixels each"
        )
        room = self.size / self.grid - 2 * self.jitter - 1
        _require(
            max(self.sizes) <= room,
            "sizes",
            self.sizes,
            f"at most {room:g}, so that objects stay in their cells",
        )
        _require(
            len(self.size_names) in (0, len(self.sizes)),
            "size_names",
            self.size_names,
            "none, or one per size",
        )
        known = bool(self.textures) and set(self.textures) <= set(TEXTURES)
        _require(known, "textures", self.textures, f"a list out of {', '.join(TEXTURES)}")
        _require(self.jitter >= 0 and self.step > 0, "jitter", self.jitter, "0 or more, with step above 0")
        _require(
            0 <= self.light_min <= self.light_max <= 255,
            "light_min",
            self.light_min,
            "0 to light_max, 255 at most",
        )
        _require(0 <= self.gradient <= 128, "gradient", self.gradient, "0 to 128")
        _require(0 <= self.held_out <= 0.5, "held_out", self.held_out, "0 to 0.5")
        _require(0 < self.test_share <= 0.5, "test_share", self.test_share, "above 0, at most 0.5")
        for name in (
            "train",
            "test",
            "shard",
            "captions",
            "conversations",
            "turns",
            "questions",
            "text_lines",
        ):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        good = len(self.asked) == 6 and min(self.asked) >= 0 and 0 < sum(self.asked) < math.inf
        _require(good, "asked", self.asked, "six shares, 0 or more, not all of them 0")
        _require(self.pair_captions >= 0, "pair_captions", self.pair_captions, "0 or more")
        _require(self.vocabulary >= 300, "vocabulary", self.vocabulary, "300 or more (256 are bytes)")

    @property
    def cell(self) -> int:
        """Side of a grid cell in pixels."""
        return self.size // self.grid

    @property
    def color_names(self) -> list[str]:
        return list(COLORS)[: self.colors]

    @property
    def shape_names(self) -> list[str]:
        return list(SHAPES)[: self.shapes]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """All (colour, shape) pairs."""
        return [(color, shape) for color in self.color_names for shape in self.shape_names]

    @functools.cached_property
    def held_out_pairs(self) -> frozenset[tuple[str, str]]:
        """The pairs that training never shows; no colour or shape loses more than it must."""
        pairs = self.pairs
        Random(f"{self.seed}/held out").shuffle(pairs)
        wanted = round(self.held_out * len(pairs))
        chosen: list[tuple[str, str]] = []
        for limit in range(1, len(pairs)):
            for color, shape in pairs:
                used = max(sum(c == color for c, _ in chosen), sum(s == shape for _, s in chosen))
                if len(chosen) < wanted and used < limit and (color, shape) not in chosen:
                    chosen.append((color, shape))
        return frozenset(chosen)


def with_values(config: SceneConfig, values: dict[str, Any]) -> SceneConfig:
    """`config` with some fields replaced; lists become tuples.

    Raises:
        UserError: an unknown key, a wrong type or a value out of range.
    """
    names = {field.name for field in fields(config)}
    for key in values:
        if key not in names:
            raise UserError(f"The scenes have no setting {key!r}." + did_you_mean(key, names))
    return replace(config, **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _require(holds: bool, key: str, value: Any, allowed: str) -> None:
    if not holds:
        raise UserError(f"scenes: {key} = {value!r} is not possible; allowed: {allowed}.")


def _check_type(key: str, value: Any, default: Any) -> None:
    if isinstance(default, tuple):
        kind = str if key in ("size_names", "textures") else (int, float)
        good = isinstance(value, tuple) and all(
            isinstance(v, kind) and not isinstance(v, bool) for v in value
        )
        wanted = "a list of words" if kind is str else "a list of numbers"
    elif isinstance(default, bool):
        good, wanted = isinstance(value, bool), "true or false"
    else:
        good = isinstance(value, (int, float) if isinstance(default, float) else int) and not isinstance(
            value, bool
        )
        wanted = "a number" if isinstance(default, float) else "a whole number"
    if not good:
        raise UserError(f"scenes: {key} = {value!r} must be {wanted}.")
