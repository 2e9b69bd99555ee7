"""Captions of scenes, and sentences for training on plain text."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from random import Random

from .config import SceneConfig
from .phrases import (
    NUMBER_WORDS,
    RELATION_PHRASES,
    a_or_an,
    is_corner,
    join_phrases,
    position_name,
    relations_between,
    with_count,
)
from .scene import Scene, SceneObject

NameOf = Callable[[SceneObject], str]


def sample_captions(scene: Scene, config: SceneConfig, rng: Random, count: int) -> list[str]:
    """`count` captions of a scene; the first names every object in full, every fourth by its shape only.

    Where scenes have size names or textures, every other caption leaves them out.
    """
    kinds = (_any_caption, _position_caption, _plain_caption, _shapes_caption)
    has_attributes = bool(config.size_names) or len(config.textures) > 1
    captions = []
    for i in range(count):
        # i // 4 shifts the alternation, so that each of the four kinds comes in both forms
        brief = has_attributes and (i + i // 4) % 2 == 1
        captions.append(kinds[i % 4](scene, config, rng, _short_name if brief else _full_name))
    return captions


def sample_pair_captions(scene: Scene, config: SceneConfig, rng: Random) -> list[str]:
    """Additional captions of two objects: every third lists both with colours, the others give a relation."""
    captions = []
    for i in range(config.pair_captions if len(scene.objects) == 2 else 0):
        name = _shape_name if i % 3 == 1 else _short_name
        if i % 3 == 0:
            captions.append(_plain_caption(scene, config, rng, name))
        else:
            captions.append(_relation_caption(rng.sample(scene.objects, 2), rng, name))
    return captions


def sample_partial_captions(scene: Scene, config: SceneConfig, rng: Random) -> list[str]:
    """Additional captions in which every object has some of its attributes: "a striped object and a star".

    A model that has learnt each attribute alone can compose pairs that training never shows.
    """
    captions = []
    for i in range(config.partial_captions):
        names = {obj: _partial_name(obj, rng) for obj in scene.objects}
        kind = _position_caption if i % 3 == 2 else _plain_caption
        captions.append(kind(scene, config, rng, names.__getitem__))
    return captions


def _partial_name(obj: SceneObject, rng: Random) -> str:
    """A name of an object from a random part of its attributes, such as "large object"; at least one."""
    words = obj.words
    kept = [word for word in words if rng.random() < 0.5] or [rng.choice(words)]
    return " ".join([*kept, *(() if obj.shape in kept else ("object",))])


def _full_name(obj: SceneObject) -> str:
    return obj.name


def _short_name(obj: SceneObject) -> str:
    return " ".join(obj.pair)


def _shape_name(obj: SceneObject) -> str:
    return obj.shape


def _any_caption(scene: Scene, config: SceneConfig, rng: Random, name: NameOf) -> str:
    return rng.choice((_plain_caption, _position_caption))(scene, config, rng, name)


def _plain_caption(scene: Scene, config: SceneConfig, rng: Random, name: NameOf) -> str:
    # by default in any order: captions must not reveal positions by the order of their objects
    shuffled = list(scene.objects)
    rng.shuffle(shuffled)  # also where it is not used: the random numbers after it must not shift
    objects = scene.objects if config.reading_order else shuffled
    # identical names are counted: "two red circles"
    listed = join_phrases([with_count(n, k) for n, k in Counter(map(name, objects)).items()])
    frame = rng.choice(("{}", "{}", "a picture of {}", "there is {}", "an image with {}"))
    # "there is a circle and ..." but "there are two circles and ..."
    if len(objects) > 1 and frame.startswith("there") and not listed.startswith("a"):
        frame = "there are {}"
    if len(objects) == 1 and rng.random() < 0.15:
        return f"one {name(objects[0])}"
    return frame.format(listed)


def _position_caption(scene: Scene, config: SceneConfig, rng: Random, name: NameOf) -> str:
    objects = list(scene.objects)
    rng.shuffle(objects)
    if len(objects) == 2 and rng.random() < 0.6:
        return _relation_caption(objects, rng, name)
    # repeated entries are sampled more often
    frames = ["{} at the {}", "{} at the {}", "{} in the {}"]
    if config.corners and all(is_corner(obj.cell, scene.grid) for obj in objects):
        frames.append("{} in the {} corner")
    frame = rng.choice(frames)
    listed = join_phrases(
        [frame.format(a_or_an(name(o)), position_name(o.cell, scene.grid)) for o in objects]
    )
    return rng.choice(("{}", "{}", "a picture of {}", "there is {}")).format(listed)


def _relation_caption(objects: Sequence[SceneObject], rng: Random, name: NameOf) -> str:
    first, second = objects
    # any relation that holds: diagonal objects have two
    relation = RELATION_PHRASES[rng.choice(relations_between(first, second))]
    frame = rng.choice(("{} {} {}", "{} {} {}", "a picture of {} {} {}", "there is {} {} {}"))
    return frame.format(a_or_an(name(first)), relation, a_or_an(name(second)))


def _shapes_caption(scene: Scene, config: SceneConfig, rng: Random, name: NameOf) -> str:
    kind = rng.choice((_plain_caption, _plain_caption, _position_caption))
    return kind(scene, config, rng, _shape_name)


def sample_sentences(config: SceneConfig, scenes: Iterator[Scene], rng: Random) -> Iterator[str]:
    """One sentence per scene, true of that scene or of shapes and colours in general."""
    # facts that no image shows, so that plain text is more than captions
    facts = [f"{color} is a color." for color in config.color_names]
    facts += [f"{a_or_an(shape)} is a shape." for shape in config.shape_names]
    facts += [
        f"{NUMBER_WORDS[n]} objects are more than {NUMBER_WORDS[n - 1]}."
        for n in range(2, config.max_objects + 1)
    ]
    facts += ["left is the other side of right.", "above is the other side of below."]
    for scene in scenes:
        obj = rng.choice(scene.objects)
        yield rng.choice(
            (
                rng.choice(facts),
                f"{sample_captions(scene, config, rng, 1)[0]}.",
                f"the {obj.name} is at the {position_name(obj.cell, scene.grid)}.",
                f"the {obj.shape} is {obj.color}.",
                f"the {obj.color} object is {a_or_an(obj.shape)}.",
            )
        )
