"""What is said of a scene: captions, questions with one-word answers, and sentences without a picture."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import NamedTuple

from .config import SceneConfig
from .scene import Scene, Thing

# names of the rows and columns of a grid, from the top and from the left
ROWS = {2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
COLUMNS = {2: ("left", "right"), 3: ("left", "middle", "right")}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
RELATIONS = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}


Known = list[tuple[str, str]]  # (colour, shape) pairs
Names = Callable[[Thing], list[str]]


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
    if len(things) == 2 and rng.random() < 0.6:
        return _related_caption(things, rng, name)
    frames = ["{} at the {}", "{} at the {}", "{} in the {}"]
    if config.corners and all(is_corner(thing.cell, scene.grid) for thing in things):
        frames.append("{} in the {} corner")
    frame = rng.choice(frames)
    said = listing([frame.format(article(name(t)), position(t.cell, scene.grid)) for t in things])
    return rng.choice(("{}", "{}", "a picture of {}", "there is {}")).format(said)


def _related_caption(things: Sequence[Thing], rng: Random, name: Callable[[Thing], str]) -> str:
    first, second = things
    relation = RELATIONS[rng.choice(relations(first, second))]
    frame = rng.choice(("{} {} {}", "{} {} {}", "a picture of {} {} {}", "there is {} {} {}"))
    return frame.format(article(name(first)), relation, article(name(second)))


def _bare_caption(scene: Scene, config: SceneConfig, rng: Random, name: Callable[[Thing], str]) -> str:
    kind = rng.choice((_plain_caption, _plain_caption, _placed_caption))
    return kind(scene, config, rng, lambda thing: thing.shape)


def pair_captions(scene: Scene, config: SceneConfig, rng: Random) -> list[str]:
    """Further captions of two objects: a third gives each its colour, the others say how they stand."""
    said = []
    for i in range(config.pair_captions if len(scene.things) == 2 else 0):
        name = (lambda thing: thing.shape) if i % 3 == 1 else (lambda thing: " ".join(thing.pair))
        if i % 3 == 0:
            said.append(_plain_caption(scene, config, rng, name))
        else:
            said.append(_related_caption(rng.sample(scene.things, 2), rng, name))
    return said


# ---- questions ---------------------------------------------------------------------------------------------


def full_name(thing: Thing) -> list[str]:
    return [thing.name]


def all_names(thing: Thing) -> list[str]:
    """What an object may be called, from all that can be said of it to its shape or its colour alone."""
    words = (
        f"{thing.texture} {' '.join(thing.pair)}",
        " ".join(thing.pair),
        thing.shape,
        f"{thing.color} object",
    )
    return list(dict.fromkeys((thing.name, *(words if thing.texture != "plain" else words[1:]))))


def ask(
    scene: Scene,
    config: SceneConfig,
    rng: Random,
    kind: str,
    known: Known,
    names: Names = full_name,
) -> Question | None:
    """A question of one kind, or None where the scene gives none.

    Absent objects are named out of `known`, the (colour, shape) pairs a reader may have heard of; `names` are
    what an object may be called where its place is asked for.
    """
    asked = QUESTIONS[kind](scene, config, rng, known, names)
    return Question(kind, *asked) if asked else None


def _called(scene: Scene, names: Names) -> dict[Thing, list[str]]:
    """The objects that can be told from the others, with the names that no other object has."""
    heard = Counter(name for thing in scene.things for name in names(thing))
    called = {thing: [name for name in names(thing) if heard[name] == 1] for thing in scene.things}
    return {thing: own for thing, own in called.items() if own}


def _one(names: list[str], rng: Random) -> str:
    """One of the names. A lot is drawn only where there is a choice, so that full names alone, which the test
    split has, leave the lots that follow as they are."""
    return rng.choice(names) if len(names) > 1 else names[0]


def conversation(scene: Scene, config: SceneConfig, rng: Random, known: Known) -> list[Question]:
    """One to `turns` different questions, their kinds drawn by the shares of `asked`."""
    wanted, names = rng.randint(1, config.turns), all_names if config.short_names else full_name
    asked: dict[str, Question] = {}
    # some scenes give no question of some kinds
    for kind in rng.choices(list(QUESTIONS), config.asked, k=4 * wanted):
        if config.short_names and kind == "relation" and any(q.kind == kind for q in asked.values()):
            continue  # the answer to one may give away the other's
        question = ask(scene, config, rng, kind, known, names)
        if question and len(asked) < wanted:
            asked.setdefault(question.text, question)
    return list(asked.values())


def _existence(
    scene: Scene, config: SceneConfig, rng: Random, known: Known, names: Names
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


def absent_pair(scene: Scene, rng: Random, known: Known, alike: bool) -> tuple[str, str]:
    """A (colour, shape) pair that is not in the scene; `alike` pairs share colour or shape with an object."""
    present = {t.pair for t in scene.things}
    absent = [pair for pair in known if pair not in present]
    near = [(c, s) for c, s in absent if any(c == t.color or s == t.shape for t in scene.things)]
    return rng.choice(near if alike and near else absent)


def _count(
    scene: Scene, config: SceneConfig, rng: Random, known: Known, names: Names
) -> tuple[str, str] | None:
    kind = rng.choice(("objects", "shape", "shape", "color"))
    if kind == "objects":
        subject, number = "objects", len(scene.things)
    else:
        words = config.shape_names if kind == "shape" else config.color_names
        found = Counter(t.shape if kind == "shape" else t.color for t in scene.things)
        number = rng.choice(sorted({0, *found.values()}))
        name = rng.choice([n for n in words if found[n] == number])
        subject = plural(name) if kind == "shape" else f"{name} objects"
    frames = ("How many {} are there?", "How many {} do you see?", "How many {} are in the picture?")
    return rng.choice(frames).format(subject), str(number)


def _color(
    scene: Scene, config: SceneConfig, rng: Random, known: Known, names: Names
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
    scene: Scene, config: SceneConfig, rng: Random, known: Known, names: Names
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
    scene: Scene, config: SceneConfig, rng: Random, known: Known, names: Names
) -> tuple[str, str] | None:
    called = _called(scene, names)
    if not called:
        return None
    thing = rng.choice(list(called))
    if rng.random() < 0.5:
        words, answer = ROWS[scene.grid], ROWS[scene.grid][thing.cell[0]]
    else:
        words, answer = COLUMNS[scene.grid], COLUMNS[scene.grid][thing.cell[1]]
    choices = f"{', '.join(words[:-1])} or {words[-1]}"
    frames = ("Where is the {}, {}?", "Is the {} at the {}?", "On which side is the {}, {}?")
    return rng.choice(frames).format(_one(called[thing], rng), choices), answer


def _relation(
    scene: Scene, config: SceneConfig, rng: Random, known: Known, names: Names
) -> tuple[str, str] | None:
    called = _called(scene, names)
    if len(called) < 2:
        return None
    first, second = rng.sample(list(called), 2)
    answer = rng.choice(relations(first, second))
    choices = "left or right" if answer in ("left", "right") else "above or below"
    if choices == "left or right":
        frames = ("Is the {} left or right of the {}?", "Is the {} to the left or to the right of the {}?")
    else:
        frames = ("Is the {} above or below the {}?", "Is the {} placed above or below the {}?")
    frame = rng.choice(frames)
    return frame.format(_one(called[first], rng), _one(called[second], rng)), answer


QUESTIONS: dict[str, Callable[..., tuple[str, str] | None]] = {
    "existence": _existence,
    "count": _count,
    "colour": _color,
    "shape": _shape,
    "position": _position,
    "relation": _relation,
}


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
