"""What is said of a scene: captions, questions with one-word answers, and sentences without a picture."""

from collections import Counter
from collections.abc import Callable, Iterator
from random import Random
from typing import NamedTuple

from .scene_config import SceneConfig
from .scene_world import Scene, Thing

# names of the rows and columns of a grid, from the top and from the left
ROWS = {2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
COLUMNS = {2: ("left", "right"), 3: ("left", "middle", "right")}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
RELATIONS = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}


class Question(NamedTuple):
    """A question about a scene with its one-word answer; `kind` is a key of QUESTIONS."""

    kind: str
    text: str
    answer: str


def position(cell: tuple[int, int], grid: int) -> str:
    """The name of a grid cell, such as "top left"; the cell in the middle of three by three is "middle"."""
    row, column = ROWS[grid][cell[0]], COLUMNS[grid][cell[1]]
    return " ".join(dict.fromkeys(word for word in (row, column) if word != "middle")) or "middle"


def is_corner(cell: tuple[int, int], grid: int) -> bool:
    """Whether a grid cell lies in a corner of the picture."""
    return set(cell) <= {0, grid - 1}


def article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def counted(name: str, count: int) -> str:
    """ "a red circle", "two red circles"."""
    return article(name) if count == 1 else f"{NUMBERS[count]} {plural(name)}"


def plural(name: str) -> str:
    return name + ("es" if name.endswith("s") else "s")


def listing(parts: list[str]) -> str:
    """ "x", "x and y", "x, y and z"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def relations(first: Thing, second: Thing) -> list[str]:
    """What `first` is to `second`: none to two of left, right, above, below, by their grid cells."""
    (row, column), (other_row, other_column) = first.cell, second.cell
    words = []
    if column != other_column:
        words.append("left" if column < other_column else "right")
    if row != other_row:
        words.append("above" if row < other_row else "below")
    return words


# ---- captions ----------------------------------------------------------------------------------------------


def captions(scene: Scene, config: SceneConfig, rng: Random, count: int) -> list[str]:
    """`count` captions of a scene; the first names all of every object, every fourth shapes alone.

    Where scenes have sizes or textures, every other caption leaves them out.
    """
    kinds = (_any_caption, _placed_caption, _plain_caption, _bare_caption)
    rich = bool(config.size_names) or len(config.textures) > 1
    said = []
    for i in range(count):
        brief = rich and (i + i // 4) % 2 == 1
        name = (lambda thing: " ".join(thing.pair)) if brief else (lambda thing: thing.name)
        said.append(kinds[i % 4](scene, config, rng, name))
    return said


def _any_caption(scene: Scene, config: SceneConfig, rng: Random, name: Callable[[Thing], str]) -> str:
    return rng.choice((_plain_caption, _placed_caption))(scene, config, rng, name)


def _plain_caption(scene: Scene, config: SceneConfig, rng: Random, name: Callable[[Thing], str]) -> str:
    things = list(scene.things)
    rng.shuffle(things)
    said = listing([counted(n, k) for n, k in Counter(map(name, things)).items()])
    frame = rng.choice(("{}", "{}", "a picture of {}", "there is {}", "an image with {}"))
    if len(things) > 1 and frame.startswith("there") and not said.startswith("a"):
        frame = "there are {}"
    if len(things) == 1 and rng.random() < 0.15:
        return f"one {name(things[0])}"
    return frame.format(said)


def _placed_caption(scene: Scene, config: SceneConfig, rng: Random, name: Callable[[Thing], str]) -> str:
    things = list(scene.things)
    rng.shuffle(things)
    related = relations(things[0], things[1]) if len(things) == 2 else []
    if related and rng.random() < 0.6:
        relation = RELATIONS[rng.choice(related)]
        frame = rng.choice(("{} {} {}", "{} {} {}", "a picture of {} {} {}", "there is {} {} {}"))
        return frame.format(article(name(things[0])), relation, article(name(things[1])))
    frames = ["{} at the {}", "{} at the {}", "{} in the {}"]
    if config.corners and all(is_corner(thing.cell, scene.grid) for thing in things):
        frames.append("{} in the {} corner")
    frame = rng.choice(frames)
    said = listing([frame.format(article(name(t)), position(t.cell, scene.grid)) for t in things])
    return rng.choice(("{}", "{}", "a picture of {}", "there is {}")).format(said)


def _bare_caption(scene: Scene, config: SceneConfig, rng: Random, name: Callable[[Thing], str]) -> str:
    kind = rng.choice((_plain_caption, _plain_caption, _placed_caption))
    return kind(scene, config, rng, lambda thing: thing.shape)


# ---- questions ---------------------------------------------------------------------------------------------


def ask(
    scene: Scene, config: SceneConfig, rng: Random, kind: str, known: list[tuple[str, str]]
) -> Question | None:
    """A question of one kind, or None where the scene gives none.

    Absent objects are named out of `known`, the (colour, shape) pairs a reader may have heard of.
    """
    asked = QUESTIONS[kind](scene, config, rng, known)
    return Question(kind, *asked) if asked else None


def conversation(
    scene: Scene, config: SceneConfig, rng: Random, known: list[tuple[str, str]]
) -> list[Question]:
    """One to `turns` different questions, their kinds drawn by ASKED."""
    wanted, kinds, shares = rng.randint(1, config.turns), list(ASKED), list(ASKED.values())
    asked: dict[str, Question] = {}
    for kind in rng.choices(kinds, shares, k=4 * wanted):  # some scenes give no question of some kinds
        question = ask(scene, config, rng, kind, known)
        if question and len(asked) < wanted:
            asked.setdefault(question.text, question)
    return list(asked.values())


def _existence(
    scene: Scene, config: SceneConfig, rng: Random, known: list[tuple[str, str]]
) -> tuple[str, str] | None:
    lot, yes = rng.random(), rng.random() < 0.5
    if lot < 0.6:
        color, shape = (
            rng.choice(scene.things).pair if yes else absent_pair(scene, rng, known, rng.random() < 0.6)
        )
        subject = article(f"{color} {shape}")
    elif lot < 0.8:
        present = sorted({t.shape for t in scene.things})
        choices = present if yes else [s for s in config.shape_names if s not in present]
        if not choices:
            return None
        subject = article(rng.choice(choices))
    else:
        present = sorted({t.color for t in scene.things})
        choices = present if yes else [c for c in config.color_names if c not in present]
        if not choices:
            return None
        subject = article(f"{rng.choice(choices)} object")
    frames = ("Is there {}?", "Is there {} in the picture?", "Is there {} in the image?", "Do you see {}?")
    return rng.choice(frames).format(subject), "yes" if yes else "no"


def absent_pair(scene: Scene, rng: Random, known: list[tuple[str, str]], alike: bool) -> tuple[str, str]:
    """A (colour, shape) pair that is not in the scene; `alike` pairs share colour or shape with an object."""
    present = {t.pair for t in scene.things}
    absent = [pair for pair in known if pair not in present]
    near = [(c, s) for c, s in absent if any(c == t.color or s == t.shape for t in scene.things)]
    return rng.choice(near if alike and near else absent)


def _count(
    scene: Scene, config: SceneConfig, rng: Random, known: list[tuple[str, str]]
) -> tuple[str, str] | None:
    kind = rng.choice(("objects", "shape", "shape", "color"))
    if kind == "objects":
        subject, number = "objects", len(scene.things)
    else:
        names = config.shape_names if kind == "shape" else config.color_names
        found = Counter(t.shape if kind == "shape" else t.color for t in scene.things)
        number = rng.choice(sorted({0, *found.values()}))
        name = rng.choice([n for n in names if found[n] == number])
        subject = plural(name) if kind == "shape" else f"{name} objects"
    frames = ("How many {} are there?", "How many {} do you see?", "How many {} are in the picture?")
    return rng.choice(frames).format(subject), str(number)


def _color(
    scene: Scene, config: SceneConfig, rng: Random, known: list[tuple[str, str]]
) -> tuple[str, str] | None:
    thing = rng.choice(scene.things)
    subjects = [f"object at the {position(thing.cell, scene.grid)}"]
    if len(scene.things) == 1:
        subjects.append("object")
    if sum(t.shape == thing.shape for t in scene.things) == 1:
        subjects += [thing.shape] * 3
    frames = ("What color is the {}?", "What is the color of the {}?", "Which color does the {} have?")
    return rng.choice(frames).format(rng.choice(subjects)), thing.color


def _shape(
    scene: Scene, config: SceneConfig, rng: Random, known: list[tuple[str, str]]
) -> tuple[str, str] | None:
    thing = rng.choice(scene.things)
    subjects = [f"object at the {position(thing.cell, scene.grid)}"]
    if len(scene.things) == 1:
        subjects.append("object")
    if sum(t.color == thing.color for t in scene.things) == 1:
        subjects += [f"{thing.color} object"] * 3
    frames = ("What shape is the {}?", "What is the shape of the {}?", "Which shape does the {} have?")
    return rng.choice(frames).format(rng.choice(subjects)), thing.shape


def _position(
    scene: Scene, config: SceneConfig, rng: Random, known: list[tuple[str, str]]
) -> tuple[str, str] | None:
    single = [t for t in scene.things if sum(o.name == t.name for o in scene.things) == 1]
    if not single:
        return None
    thing = rng.choice(single)
    if rng.random() < 0.5:
        words, answer = ROWS[scene.grid], ROWS[scene.grid][thing.cell[0]]
    else:
        words, answer = COLUMNS[scene.grid], COLUMNS[scene.grid][thing.cell[1]]
    choices = f"{', '.join(words[:-1])} or {words[-1]}"
    frames = ("Where is the {}, {}?", "Is the {} at the {}?", "On which side is the {}, {}?")
    return rng.choice(frames).format(thing.name, choices), answer


def _relation(
    scene: Scene, config: SceneConfig, rng: Random, known: list[tuple[str, str]]
) -> tuple[str, str] | None:
    single = [t for t in scene.things if sum(o.name == t.name for o in scene.things) == 1]
    if len(single) < 2:
        return None
    first, second = rng.sample(single, 2)
    answer = rng.choice(relations(first, second))
    choices = "left or right" if answer in ("left", "right") else "above or below"
    if choices == "left or right":
        frames = ("Is the {} left or right of the {}?", "Is the {} to the left or to the right of the {}?")
    else:
        frames = ("Is the {} above or below the {}?", "Is the {} placed above or below the {}?")
    return rng.choice(frames).format(first.name, second.name), answer


QUESTIONS: dict[str, Callable[..., tuple[str, str] | None]] = {
    "existence": _existence,
    "count": _count,
    "colour": _color,
    "shape": _shape,
    "position": _position,
    "relation": _relation,
}

# How often training asks each kind: what must be compared, not only read off, is learnt last.
ASKED = {"existence": 3, "count": 1, "colour": 1, "shape": 1, "position": 1, "relation": 3}


# ---- text without a picture --------------------------------------------------------------------------------


def sentences(config: SceneConfig, scenes: Iterator[Scene], rng: Random) -> Iterator[str]:
    """One sentence for each scene, all true of it or of shapes and colours in general."""
    facts = [f"{color} is a color." for color in config.color_names]
    facts += [f"{article(shape)} is a shape." for shape in config.shape_names]
    facts += [
        f"{NUMBERS[n]} objects are more than {NUMBERS[n - 1]}." for n in range(2, config.max_objects + 1)
    ]
    facts += ["left is the other side of right.", "above is the other side of below."]
    for scene in scenes:
        thing = rng.choice(scene.things)
        yield rng.choice(
            (
                rng.choice(facts),
                f"{captions(scene, config, rng, 1)[0]}.",
                f"the {thing.name} is at the {position(thing.cell, scene.grid)}.",
                f"the {thing.shape} is {thing.color}.",
                f"the {thing.color} object is {article(thing.shape)}.",
            )
        )
