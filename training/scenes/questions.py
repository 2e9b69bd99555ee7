"""Questions about scenes with one-word answers, and conversations made of them."""

import re
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import NamedTuple

from .config import QUESTION_KINDS, SceneConfig
from .phrases import COLUMN_NAMES, ROW_NAMES, a_or_an, plural, position_name, relations_between
from .scene import Scene, SceneObject

Pairs = list[tuple[str, str]]  # (colour, shape)
NamesOf = Callable[[SceneObject], list[str]]
TextAndAnswer = tuple[str, str]


class SceneQuestion(NamedTuple):
    """A question about a scene with its one-word answer; `kind` is one of QUESTION_KINDS."""

    kind: str
    text: str
    answer: str


def full_name(obj: SceneObject) -> list[str]:
    return [obj.name]


def all_names(obj: SceneObject) -> list[str]:
    """All names of an object, from all its attributes to only its shape or its colour."""
    words = (
        f"{obj.texture} {' '.join(obj.pair)}",
        " ".join(obj.pair),
        obj.shape,
        f"{obj.color} object",
    )
    return list(dict.fromkeys((obj.name, *(words if obj.texture != "plain" else words[1:]))))


def sample_question(
    scene: Scene,
    config: SceneConfig,
    rng: Random,
    kind: str,
    known: Pairs,
    names: NamesOf = full_name,
) -> SceneQuestion | None:
    """A question of one kind, or None where the scene allows none.

    Args:
        known: the (colour, shape) pairs that absent objects are sampled from.
        names: possible names of an object in questions about its position.
    """
    made = _MAKERS[kind](scene, config, rng, known, names)
    return SceneQuestion(kind, *made) if made else None


def sample_conversation(scene: Scene, config: SceneConfig, rng: Random, known: Pairs) -> list[SceneQuestion]:
    """One to `turns` different questions, their kinds sampled by `question_shares`.

    With `ask_positions` they are of the other kinds, and those of `_position_questions` come between them.
    """
    wanted, names = rng.randint(1, config.turns), all_names if config.short_names else full_name
    found: dict[str, SceneQuestion] = {}
    # four candidates per question: some scenes allow no question of some kinds, and duplicates are dropped
    kinds = rng.choices(QUESTION_KINDS, list(config.question_shares.values()), k=4 * wanted)
    for kind in kinds:
        if config.ask_positions and kind in ("position", "relation"):
            continue
        if config.short_names and kind == "relation" and any(q.kind == kind for q in found.values()):
            continue  # one relation can give away the answer to another
        question = sample_question(scene, config, rng, kind, known, names)
        if question and len(found) < wanted:
            found.setdefault(question.text, question)
    if not config.ask_positions:
        return list(found.values())
    questions = [*found.values(), *_position_questions(scene, list(found.values()), rng, names)]
    rng.shuffle(questions)
    return questions


def _position_questions(
    scene: Scene, others: list[SceneQuestion], rng: Random, names: NamesOf
) -> list[SceneQuestion]:
    """Relations of up to two pairs of objects, and the rows and columns that those leave open.

    On a 2 x 2 grid the answer "left" of a relation gives away both columns. So each object's row, and its
    column, is the subject of one question, and of none if one of `others` names its position: no other answer
    alone gives it away. Several may, since two objects never share a cell.
    """
    unique = _unique_names(scene, names)
    told = [obj for obj in unique if any(_names_position(q.text, obj, scene.grid) for q in others)]
    places = [(obj, axis) for obj in unique if obj not in told for axis in (0, 1)]
    pairs = [(a, b, axis) for a in unique for b in unique for axis in (0, 1) if a.cell[axis] != b.cell[axis]]
    rng.shuffle(pairs)
    found, wanted = [], rng.randint(0, 2)
    for first, second, axis in pairs:
        if len(found) < wanted and (first, axis) in places and (second, axis) in places:
            places.remove((first, axis))
            places.remove((second, axis))
            answer = relations_between(first, second)[0 if axis else -1]  # columns come first
            found.append(SceneQuestion("relation", *_ask_relation(first, second, answer, unique, rng)))
    for obj, axis in places:
        found.append(SceneQuestion("position", *_ask_position(obj, axis, scene.grid, unique, rng)))
    return found


def _names_position(text: str, obj: SceneObject, grid: int) -> bool:
    """Whether a question is about "the object at the top left", where `obj` is; "top" is not "top left"."""
    return re.search(rf"at the {position_name(obj.cell, grid)}(?! (left|right))", text) is not None


def absent_pair(scene: Scene, rng: Random, known: Pairs, similar: bool) -> tuple[str, str]:
    """A (colour, shape) pair that the scene lacks; `similar` ones share colour or shape with an object."""
    present = {o.pair for o in scene.objects}
    absent = [pair for pair in known if pair not in present]
    # similar ones are hard negatives
    near = [(c, s) for c, s in absent if any(c == o.color or s == o.shape for o in scene.objects)]
    return rng.choice(near if similar and near else absent)


def _unique_names(scene: Scene, names: NamesOf) -> dict[SceneObject, list[str]]:
    """Object -> the names that no other object of the scene has; objects without one are left out."""
    uses = Counter(name for obj in scene.objects for name in names(obj))
    unique = {obj: [name for name in names(obj) if uses[name] == 1] for obj in scene.objects}
    return {obj: own for obj, own in unique.items() if own}


def _choose_name(names: list[str], rng: Random) -> str:
    # No random number where there is no choice: the frozen test split has full names only, and its later
    # samples must not shift.
    return rng.choice(names) if len(names) > 1 else names[0]


def _existence(
    scene: Scene, config: SceneConfig, rng: Random, known: Pairs, names: NamesOf
) -> TextAndAnswer | None:
    # both answers equally often; three in five questions name a pair, the others only a shape or a colour
    sample, yes = rng.random(), rng.random() < 0.5
    if sample < 0.6:
        color, shape = (
            rng.choice(scene.objects).pair if yes else absent_pair(scene, rng, known, rng.random() < 0.6)
        )
        subject = a_or_an(f"{color} {shape}")
    elif sample < 0.8:
        # sorted: the order of a set of strings differs between processes
        present = sorted({o.shape for o in scene.objects})
        choices = present if yes else [s for s in config.shape_names if s not in present]
        if not choices:
            return None
        subject = a_or_an(rng.choice(choices))
    else:
        present = sorted({o.color for o in scene.objects})
        choices = present if yes else [c for c in config.color_names if c not in present]
        if not choices:
            return None
        subject = a_or_an(f"{rng.choice(choices)} object")
    frames = ("Is there {}?", "Is there {} in the picture?", "Is there {} in the image?", "Do you see {}?")
    return rng.choice(frames).format(subject), "yes" if yes else "no"


def _count(
    scene: Scene, config: SceneConfig, rng: Random, known: Pairs, names: NamesOf
) -> TextAndAnswer | None:
    counted = rng.choice(("objects", "shape", "shape", "color"))
    if counted == "objects":
        subject, number = "objects", len(scene.objects)
    else:
        words = config.shape_names if counted == "shape" else config.color_names
        found = Counter(o.shape if counted == "shape" else o.color for o in scene.objects)
        # sample the answer first, then a word with that count: 0 would otherwise dominate
        number = rng.choice(sorted({0, *found.values()}))
        name = rng.choice([n for n in words if found[n] == number])
        subject = plural(name) if counted == "shape" else f"{name} objects"
    frames = ("How many {} are there?", "How many {} do you see?", "How many {} are in the picture?")
    return rng.choice(frames).format(subject), str(number)


def _color(
    scene: Scene, config: SceneConfig, rng: Random, known: Pairs, names: NamesOf
) -> TextAndAnswer | None:
    obj, text = _attribute_question(scene, rng, "color", lambda obj: obj.shape)
    return text, obj.color


def _shape(
    scene: Scene, config: SceneConfig, rng: Random, known: Pairs, names: NamesOf
) -> TextAndAnswer | None:
    obj, text = _attribute_question(scene, rng, "shape", lambda obj: f"{obj.color} object")
    return text, obj.shape


def _attribute_question(
    scene: Scene, rng: Random, attribute: str, name_without: Callable[[SceneObject], str]
) -> tuple[SceneObject, str]:
    """An object and a question about an attribute of it; `name_without` names objects by another one."""
    obj = rng.choice(scene.objects)
    # every subject identifies the object without giving away the answer
    subjects = [f"object at the {position_name(obj.cell, scene.grid)}"]
    if len(scene.objects) == 1:
        subjects.append("object")
    name = name_without(obj)
    if sum(name_without(o) == name for o in scene.objects) == 1:
        subjects += [name] * 3  # three times as likely as the position
    frames = ("What {} is the {}?", "What is the {} of the {}?", "Which {} does the {} have?")
    return obj, rng.choice(frames).format(attribute, rng.choice(subjects))


def _position(
    scene: Scene, config: SceneConfig, rng: Random, known: Pairs, names: NamesOf
) -> TextAndAnswer | None:
    unique = _unique_names(scene, names)
    if not unique:
        return None
    obj = rng.choice(list(unique))
    # the row or the column: one word answers either
    return _ask_position(obj, 0 if rng.random() < 0.5 else 1, scene.grid, unique, rng)


def _ask_position(
    obj: SceneObject, axis: int, grid: int, unique: dict[SceneObject, list[str]], rng: Random
) -> TextAndAnswer:
    words = (ROW_NAMES, COLUMN_NAMES)[axis][grid]
    choices = f"{', '.join(words[:-1])} or {words[-1]}"
    frames = ("Where is the {}, {}?", "Is the {} at the {}?", "On which side is the {}, {}?")
    return rng.choice(frames).format(_choose_name(unique[obj], rng), choices), words[obj.cell[axis]]


def _relation(
    scene: Scene, config: SceneConfig, rng: Random, known: Pairs, names: NamesOf
) -> TextAndAnswer | None:
    unique = _unique_names(scene, names)
    if len(unique) < 2:
        return None
    # diagonal objects have two relations: the choices offered ("left or right") match the sampled answer
    first, second = rng.sample(list(unique), 2)
    return _ask_relation(first, second, rng.choice(relations_between(first, second)), unique, rng)


def _ask_relation(
    first: SceneObject,
    second: SceneObject,
    answer: str,
    unique: dict[SceneObject, list[str]],
    rng: Random,
) -> TextAndAnswer:
    if answer in ("left", "right"):
        frames = ("Is the {} left or right of the {}?", "Is the {} to the left or to the right of the {}?")
    else:
        frames = ("Is the {} above or below the {}?", "Is the {} placed above or below the {}?")
    frame = rng.choice(frames)
    return frame.format(_choose_name(unique[first], rng), _choose_name(unique[second], rng)), answer


_MAKERS: dict[str, Callable[..., TextAndAnswer | None]] = dict(
    zip(QUESTION_KINDS, (_existence, _count, _color, _shape, _position, _relation), strict=True)
)
