"""Settings of a scene data set: a frozen dataclass that validates its values."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from random import Random
from typing import Any

from open_unitok.core.errors import UserError, did_you_mean

from .shapes import COLORS, SHAPES, TEXTURES

# Do not reorder: the random numbers of a seed depend on the order.
QUESTION_KINDS = ("existence", "count", "colour", "shape", "position", "relation")
_DEFAULT_SHARES: dict[str, float] = dict(zip(QUESTION_KINDS, (3.0, 1.0, 1.0, 1.0, 1.0, 3.0)))


def _setting(default: Any, help: str) -> Any:
    """A dataclass field with the help text of its command-line option."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class SceneConfig:
    """Content and size of a scene data set. The defaults are those of the demo."""

    size: int = _setting(32, "image side in pixels")
    grid: int = _setting(2, "cells per side; every object stays inside its cell")
    min_objects: int = _setting(1, "fewest objects per scene")
    max_objects: int = _setting(2, "most objects per scene")
    shapes: int = _setting(4, "number of shapes")
    colors: int = _setting(6, "number of colours")
    sizes: tuple[float, ...] = _setting((10, 11, 12), "sides of an object's bounding box in pixels")
    size_names: tuple[str, ...] = _setting(
        (), "one name per size for captions and questions, or none: sizes are then not mentioned"
    )
    textures: tuple[str, ...] = _setting(("plain",), "fill patterns: plain, striped, dotted")
    jitter: float = _setting(1.0, "largest offset of an object from its cell's centre, pixels")
    step: float = _setting(1.0, "offsets are multiples of this, pixels")
    light_min: int = _setting(222, "lower limit of the background's red, green and blue")
    light_max: int = _setting(250, "upper limit of the background's red, green and blue")
    gradient: int = _setting(0, "largest change of the background across the image, levels of 255")
    held_out: float = _setting(0.1, "share of colour x shape pairs that never appear in training")
    test_share: float = _setting(0.1, "share of all arrangements that is reserved for evaluation")
    train: int = _setting(20_000, "number of training scenes")
    test: int = _setting(1_000, "number of test scenes")
    split: str = _setting(
        "test",
        "test, or validation: other scenes, questions and prompts in its place, to choose settings by; "
        "without training data",
    )
    shard: int = _setting(2_000, "training scenes per tar")
    corners: bool = _setting(False, 'captions also say "in the top left corner"')
    classes: bool = _setting(
        False, "records also have a class, the number of the object's colour x shape pair; one object each"
    )
    captions: int = _setting(4, "captions per scene")
    conversations: int = _setting(4, "conversations per training scene")
    turns: int = _setting(4, "most questions per conversation")
    question_shares: dict[str, float] = dataclasses.field(
        default_factory=lambda: dict(_DEFAULT_SHARES),
        metadata={
            "help": "relative frequency of each kind of training question; a kind left out is not asked"
        },
    )
    short_names: bool = _setting(
        False,
        "training questions also name objects by shape or colour alone, with one relation per conversation",
    )
    ask_positions: bool = _setting(
        False,
        "training conversations also ask for each object's row and column, once each; `turns` counts the "
        "other questions, which are then not about positions or relations",
    )
    pair_captions: int = _setting(0, "additional captions of training scenes with two objects")
    reading_order: bool = _setting(
        False,
        "captions without positions list the objects from left to right and from top to bottom, so that "
        "their order tells positions",
    )
    partial_captions: int = _setting(
        0, "additional captions of training scenes that name objects by some of their attributes"
    )
    questions: int = _setting(4, "questions per test scene")
    pope: int = _setting(150, "test scenes per POPE category, two questions each")
    prompts: int = _setting(25, "prompts per GenEval tag")
    text_lines: int = _setting(4_000, "lines of plain text")
    vocabulary: int = _setting(512, "vocabulary size of the text tokenizer, 259 bytes and controls included")
    seed: int = _setting(0, "random seed")

    def __post_init__(self) -> None:
        defaults = {field.name: _default(field) for field in fields(self)}
        for name, default in defaults.items():
            _check_type(name, getattr(self, name), default)
        # 10 and 10.0 are the same setting and must give the same scenes
        # object.__setattr__: a frozen dataclass rejects plain assignment
        object.__setattr__(self, "sizes", tuple(map(float, self.sizes)))
        for name in ("jitter", "step", "held_out", "test_share"):
            object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "question_shares", _all_shares(self.question_shares))
        for holds, name, allowed in _rules(self):
            if not holds:
                raise UserError(f"scenes: {name} = {getattr(self, name)!r} is not possible; {allowed}.")

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

    @property
    def class_pairs(self) -> list[tuple[str, str]]:
        """The (colour, shape) pair of each class: those that training shows."""
        return [pair for pair in self.pairs if pair not in self.held_out_pairs]

    @functools.cached_property
    def held_out_pairs(self) -> frozenset[tuple[str, str]]:
        """The (colour, shape) pairs that training never shows, spread evenly over colours and shapes."""
        pairs = self.pairs
        Random(f"{self.seed}/held out").shuffle(pairs)
        wanted = round(self.held_out * len(pairs))
        chosen: list[tuple[str, str]] = []
        # raise the limit per colour and per shape only after every pair that fits below it is taken
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
            raise UserError(f"scenes: {key!r} is not a setting." + did_you_mean(key, names))
    return replace(config, **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def parse_shares(words: Sequence[str]) -> dict[str, float]:
    """["count=3", "shape=1"] -> {"count": 3.0, "shape": 1.0}, as `--question-shares` takes them."""
    shares = {}
    for word in words:
        kind, _, number = word.partition("=")
        try:
            shares[kind] = float(number)
        except ValueError:
            raise UserError(f"scenes: question_shares: {word!r} must be KIND=NUMBER.") from None
    return shares


def _all_shares(shares: Mapping[str, float]) -> dict[str, float]:
    """One share for every kind of question, in the order of QUESTION_KINDS; missing ones are 0."""
    for kind in shares:
        if kind not in QUESTION_KINDS:
            hint = did_you_mean(str(kind), QUESTION_KINDS)
            raise UserError(f"scenes: question_shares: {kind!r} is not a kind of question.{hint}")
    return {kind: float(shares.get(kind, 0)) for kind in QUESTION_KINDS}


def _rules(c: SceneConfig) -> Iterator[tuple[bool, str, str]]:
    """(whether it holds, setting, what is allowed) for every range and dependency between settings."""
    yield c.grid in (2, 3), "grid", "expected 2 or 3"  # first: the rules below divide by it
    largest = c.size / c.grid - 2 * c.jitter - 1  # an object must stay in its cell at the largest offset
    known_textures = bool(c.textures) and set(c.textures) <= set(TEXTURES)
    shares = c.question_shares.values()
    at_least_one = (
        "train", "test", "shard", "captions", "conversations", "turns", "questions", "text_lines",
    )  # fmt: skip
    yield from [
        (c.split in ("test", "validation"), "split", "expected test or validation"),
        (16 <= c.size <= 1024 and c.size % c.grid == 0, "size", "expected a multiple of grid, 16 to 1024"),
        (1 <= c.min_objects <= c.max_objects, "min_objects", "expected 1 to max_objects"),
        (c.max_objects <= min(c.grid**2, 6), "max_objects", "expected at most one per cell and at most 6"),
        (not c.classes or c.max_objects == 1, "classes", "expected max_objects = 1 with it"),
        (2 <= c.shapes <= len(SHAPES), "shapes", f"expected 2 to {len(SHAPES)}"),
        (2 <= c.colors <= len(COLORS), "colors", f"expected 2 to {len(COLORS)}"),
        (bool(c.sizes) and min(c.sizes) >= 4, "sizes", "expected a list of numbers of at least 4 pixels"),
        (max(c.sizes, default=0) <= largest, "sizes",
         f"expected at most {largest:g}, so that objects stay in their cells"),
        (len(c.size_names) in (0, len(c.sizes)), "size_names", "expected none, or one per size"),
        (known_textures, "textures", f"expected a list of {', '.join(TEXTURES)}"),
        (c.jitter >= 0 and c.step > 0, "jitter", "expected 0 or more, with step above 0"),
        (0 <= c.light_min <= c.light_max <= 255, "light_min", "expected 0 to light_max, 255 at most"),
        (0 <= c.gradient <= 128, "gradient", "expected 0 to 128"),
        (0 <= c.held_out <= 0.5, "held_out", "expected 0 to 0.5"),
        (0 < c.test_share <= 0.5, "test_share", "expected above 0 and at most 0.5"),
        *((getattr(c, name) >= 1, name, "expected 1 or more") for name in at_least_one),
        (min(shares) >= 0 and 0 < sum(shares) < math.inf, "question_shares",
         "expected finite numbers of 0 or more, at least one of them above 0"),
        (c.pair_captions >= 0, "pair_captions", "expected 0 or more"),
        (c.partial_captions >= 0, "partial_captions", "expected 0 or more"),
        (c.vocabulary >= 300, "vocabulary", "expected 300 or more (256 are bytes)"),
    ]  # fmt: skip


def _default(field: dataclasses.Field) -> Any:
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def _check_type(key: str, value: Any, default: Any) -> None:
    """Reject a value whose type differs from the default's; a bool is not a number here."""
    # a bool default is tested before the numbers: bool is a subclass of int
    if isinstance(default, dict):
        good, wanted = (
            isinstance(value, dict) and all(map(_is_number, value.values())),
            (f"a mapping of {', '.join(default)} to numbers"),
        )
    elif isinstance(default, tuple):
        words = key in ("size_names", "textures")
        good = isinstance(value, tuple) and all(isinstance(v, str) if words else _is_number(v) for v in value)
        wanted = "a list of words" if words else "a list of numbers"
    elif isinstance(default, bool):
        good, wanted = isinstance(value, bool), "true or false"
    elif isinstance(default, float):
        good, wanted = _is_number(value), "a number"
    elif isinstance(default, str):
        good, wanted = isinstance(value, str), "a word"
    else:
        good, wanted = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    if not good:
        raise UserError(f"scenes: {key} = {value!r} must be {wanted}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
