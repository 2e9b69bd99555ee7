"""Writes the test split of the scenes as VQAv2, POPE and GenEval lay theirs out."""

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from open_unitok.core.files import write_atomic, write_jsonl

from .config import SceneConfig
from .language import (
    QUESTIONS,
    RELATIONS,
    Question,
    absent_pair,
    article,
    ask,
    captions,
    counted,
    listing,
    position,
)
from .scene import Scene, render, sample_scene

SUBTYPE = "scenes_test"  # VQAv2's data_subtype
ANSWER_TYPES = {"existence": "yes/no", "count": "number"}  # all others are "other"
POPE_CATEGORIES = ("random", "popular", "adversarial")
Row = dict[str, Any]


def write_test_split(config: SceneConfig, folder: Path, advance: Callable[[int], object]) -> None:
    """Write test pictures, questions and prompts below `folder`; `advance` hears of every picture written."""
    scenes = [sample_scene(config, "test", index) for index in range(config.test)]
    if (folder / "images").exists():
        advance(config.test)
    else:
        _write_images(scenes, folder / "images", advance)
    _write_captions(config, scenes, folder)
    _write_vqa(config, scenes, folder)
    _write_pope(config, scenes, folder)
    write_jsonl(folder / "geneval" / "evaluation_metadata.jsonl", geneval_prompts(config))
    write_jsonl(folder / "drawing_positions.jsonl", position_prompts(config))


def _write_images(scenes: list[Scene], folder: Path, advance: Callable[[int], object]) -> None:
    partial = folder.with_name("images.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for number, scene in enumerate(scenes):
        render(scene).save(partial / Path(image_file(number)).name)
        advance(1)
    partial.rename(folder)


def image_file(number: int) -> str:
    return f"images/{SUBTYPE}_{number:012d}.png"


def has_held_out(scene: Scene, config: SceneConfig) -> bool:
    return any(thing.pair in config.held_out_pairs for thing in scene.things)


def _write_captions(config: SceneConfig, scenes: list[Scene], folder: Path) -> None:
    rows = []
    for number, scene in enumerate(scenes):
        rng = Random(f"{config.seed}/test captions/{number}")
        rows.append(
            {
                "image_id": number,
                "file": image_file(number),
                "captions": captions(scene, config, rng, config.captions),
                "scene": scene.as_json(),
                "held_out": has_held_out(scene, config),
            }
        )
    _write_compact(folder / "captions.json", rows)


# ---- questions as VQAv2 lays them out ----------------------------------------------------------------------


def questions_of(config: SceneConfig, scene: Scene, number: int) -> list[Question]:
    """Up to `questions` questions of different kinds; a picture that has a relation is asked for it."""
    rng = Random(f"{config.seed}/test questions/{number}")
    rest = [kind for kind in QUESTIONS if kind != "relation"]
    kinds = ["relation", *rng.sample(rest, len(rest))]
    asked = (ask(scene, config, rng, kind, config.pairs) for kind in kinds)
    return [question for question in asked if question][: config.questions]


def _write_vqa(config: SceneConfig, scenes: list[Scene], folder: Path) -> None:
    head = {
        "info": {"description": "Questions about scenes of coloured shapes", "version": "1.0"},
        "data_type": "scenes",
        "data_subtype": SUBTYPE,
        "license": {"name": "MIT"},
    }
    questions: list[Row] = []
    annotations: list[Row] = []
    for number, scene in enumerate(scenes):
        for asked in questions_of(config, scene, number):
            ids = {"image_id": number, "question_id": len(questions)}
            questions.append({**ids, "question": asked.text})
            annotations.append(
                {
                    **ids,
                    "question_type": asked.kind,
                    "answer_type": ANSWER_TYPES.get(asked.kind, "other"),
                    "multiple_choice_answer": asked.answer,
                    "answers": [
                        {"answer": asked.answer, "answer_confidence": "yes", "answer_id": i}
                        for i in range(1, 11)
                    ],
                    "held_out": has_held_out(scene, config),
                }
            )
    task = {**head, "task_type": "Open-Ended"}
    _write_compact(folder / "v2_OpenEnded_scenes_test_questions.json", {**task, "questions": questions})
    _write_compact(folder / "v2_scenes_test_annotations.json", {**head, "annotations": annotations})


def _write_compact(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, separators=(",", ":")) + "\n")


# ---- POPE --------------------------------------------------------------------------------------------------


def _write_pope(config: SceneConfig, scenes: list[Scene], folder: Path) -> None:
    """One object that is there and one that is not, per picture and category.

    Absent objects are (colour, shape) pairs drawn: "random" from all of them; "popular" from the half that is
    seen most often in the test pictures; "adversarial" from those that share colour or shape with an object
    of the picture, the scenes' counterpart of things that often stand together.
    """
    seen = Counter(thing.pair for scene in scenes for thing in scene.things)
    ranked = sorted(config.pairs, key=lambda pair: (-seen[pair], pair))
    popular = ranked[: max(len(ranked) // 2, config.max_objects + 1)]
    for category in POPE_CATEGORIES:
        rows: list[Row] = []
        for number, scene in enumerate(scenes[: config.pope]):
            rng = Random(f"{config.seed}/pope {category}/{number}")
            absent = absent_pair(
                scene, rng, popular if category == "popular" else config.pairs, category == "adversarial"
            )
            for (color, shape), label in ((rng.choice(scene.things).pair, "yes"), (absent, "no")):
                rows.append(
                    {
                        "question_id": len(rows) + 1,
                        "image": Path(image_file(number)).name,
                        "text": f"Is there {article(f'{color} {shape}')} in the image?",
                        "label": label,
                    }
                )
        write_jsonl(folder / f"scenes_pope_{category}.json", rows)


# ---- prompts to draw ---------------------------------------------------------------------------------------


def geneval_prompts(config: SceneConfig) -> list[Row]:
    """Prompts in GenEval's layout, up to `prompts` per tag; class is a shape, color a colour."""
    rows: list[Row] = []
    for tag, candidates in PROMPTS.items():
        rng, seen = Random(f"{config.seed}/geneval {tag}"), set()
        for row in candidates(config, rng):
            if len(seen) >= config.prompts:
                break
            if row["prompt"] not in seen:
                seen.add(row["prompt"])
                used = {(c["color"], c["class"]) for c in row["include"] if "color" in c}
                held_out = any(pair in config.held_out_pairs for pair in used)
                rows.append({"tag": tag, **row, "held_out": held_out})
    return rows


def _shuffled(items: Iterable[Any], rng: Random) -> list[Any]:
    items = list(items)
    rng.shuffle(items)
    return items


def _row(include: list[Row], prompt: str, exclude: Iterable[Row] = ()) -> Row:
    exclude = list(exclude)
    return {"include": include, **({"exclude": exclude} if exclude else {}), "prompt": prompt}


def _single(config: SceneConfig, rng: Random) -> Iterator[Row]:
    frames = ("{}", "a picture of {}", "there is {}", "an image with {}")
    for frame in frames:
        for shape in _shuffled(config.shape_names, rng):
            yield _row([{"class": shape, "count": 1}], frame.format(article(shape)))
    for shape in _shuffled(config.shape_names, rng):
        yield _row([{"class": shape, "count": 1}], f"one {shape}")


def _two(config: SceneConfig, rng: Random) -> Iterator[Row]:
    for frame in ("{}", "a picture of {}", "there is {}"):
        for pair in _shuffled(itertools.permutations(config.shape_names, 2), rng):
            include = [{"class": shape, "count": 1} for shape in pair]
            yield _row(include, frame.format(listing([article(shape) for shape in pair])))


def _counting(config: SceneConfig, rng: Random) -> Iterator[Row]:
    numbers = range(max(2, config.min_objects), config.max_objects + 1)
    for frame in ("{}", "a picture of {}"):
        for number, shape in _shuffled(itertools.product(numbers, config.shape_names), rng):
            include, exclude = {"class": shape, "count": number}, {"class": shape, "count": number + 1}
            yield _row([include], frame.format(counted(shape, number)), [exclude])
    for number, (color, shape) in _shuffled(itertools.product(numbers, config.pairs), rng):
        include = {"class": shape, "count": number, "color": color}
        exclude = {"class": shape, "count": number + 1}
        yield _row([include], counted(f"{color} {shape}", number), [exclude])


def _colors(config: SceneConfig, rng: Random) -> Iterator[Row]:
    for frame in ("{}", "a picture of {}"):
        for color, shape in _shuffled(config.pairs, rng):
            include = {"class": shape, "count": 1, "color": color}
            yield _row([include], frame.format(article(f"{color} {shape}")))


def _position(config: SceneConfig, rng: Random) -> Iterator[Row]:
    choices = itertools.product(itertools.permutations(config.shape_names, 2), RELATIONS)
    for (shape, target), relation in _shuffled(choices, rng):
        # GenEval's order: the target first, and the relation is what the second clause is to clause 0
        include = [
            {"class": target, "count": 1},
            {"class": shape, "count": 1, "position": [GENEVAL_RELATIONS[relation], 0]},
        ]
        yield _row(include, f"{article(shape)} {RELATIONS[relation]} {article(target)}")


def _attribution(config: SceneConfig, rng: Random) -> Iterator[Row]:
    pairs = itertools.permutations(config.pairs, 2)
    for first, second in _shuffled([(a, b) for a, b in pairs if a[0] != b[0] and a[1] != b[1]], rng):
        include = [{"class": shape, "count": 1, "color": color} for color, shape in (first, second)]
        yield _row(include, listing([article(f"{color} {shape}") for color, shape in (first, second)]))


GENEVAL_RELATIONS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
PROMPTS: dict[str, Callable[[SceneConfig, Random], Iterator[Row]]] = {
    "single_object": _single,
    "two_object": _two,
    "counting": _counting,
    "colors": _colors,
    "position": _position,
    "color_attr": _attribution,
}


def position_prompts(config: SceneConfig) -> list[Row]:
    """A single object at every named position, in every colour and shape."""
    rng, rows = Random(f"{config.seed}/positions"), []
    cells = itertools.product(range(config.grid), repeat=2)
    for cell, (color, shape) in _shuffled(itertools.product(cells, config.pairs), rng):
        place = position(cell, config.grid)
        rows.append(
            {
                "prompt": f"{article(f'{color} {shape}')} at the {place}",
                "class": shape,
                "color": color,
                "cell": list(cell),
                "position": place,
                "held_out": (color, shape) in config.held_out_pairs,
            }
        )
    return rows
