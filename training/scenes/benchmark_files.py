"""Writes the benchmark files of a scene data set's test split, in the layouts of VQAv2, POPE and GenEval."""

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from open_unitok.core.files import write_atomic, write_jsonl

from .captions import sample_captions
from .config import QUESTION_KINDS, SceneConfig
from .phrases import RELATION_PHRASES, a_or_an, join_phrases, position_name, with_count
from .questions import SceneQuestion, absent_pair, sample_question
from .scene import Scene, render, sample_scene

_SUBTYPE = "scenes_test"  # VQAv2's data_subtype
_ANSWER_TYPES = {"existence": "yes/no", "count": "number"}  # all others are "other"
_POPE_CATEGORIES = ("random", "popular", "adversarial")
_Record = dict[str, Any]


def write_test_split(config: SceneConfig, folder: Path, on_images: Callable[[int], object]) -> None:
    """Write images, questions and prompts of the split below `folder`; `on_images(n)` reports n images."""
    scenes = evaluation_scenes(config)
    if (folder / "images").exists():  # complete, see _write_images; text files are fast to rewrite
        on_images(config.test)
    else:
        _write_images(scenes, folder / "images", on_images)
    _write_captions(config, scenes, folder)
    _write_vqa(config, scenes, folder)
    _write_pope(config, scenes, folder)
    write_jsonl(folder / "geneval" / "evaluation_metadata.jsonl", geneval_prompts(config))
    write_jsonl(folder / "positions.jsonl", position_prompts(config))
    write_attribute_prompts(config, folder)
    if config.classes:
        write_jsonl(folder / "classes.jsonl", class_records(config))


def evaluation_scenes(config: SceneConfig) -> list[Scene]:
    """The scenes of the split: validation has no arrangement of the test split."""
    test = (sample_scene(config, "test", index) for index in range(config.test))
    if config.split == "test":
        return list(test)
    known = {scene.objects for scene in test}
    candidates = (sample_scene(config, "validation", index) for index in itertools.count())
    return list(itertools.islice((s for s in candidates if s.objects not in known), config.test))


def _rng(config: SceneConfig, purpose: str) -> Random:
    """The random numbers of one purpose; those of "test" are as before there was a validation split."""
    return Random(f"{config.seed}/{'' if config.split == 'test' else 'validation '}{purpose}")


def _write_images(scenes: list[Scene], folder: Path, on_images: Callable[[int], object]) -> None:
    # the folder gets its name only when it is complete
    partial = folder.with_name("images.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for number, scene in enumerate(scenes):
        render(scene).save(partial / Path(_image_file(number)).name)
        on_images(1)
    partial.rename(folder)


def _image_file(number: int) -> str:
    return f"images/{_SUBTYPE}_{number:012d}.png"


def _has_held_out(scene: Scene, config: SceneConfig) -> bool:
    return any(obj.pair in config.held_out_pairs for obj in scene.objects)


def _write_captions(config: SceneConfig, scenes: list[Scene], folder: Path) -> None:
    records = []
    for number, scene in enumerate(scenes):
        rng = _rng(config, f"test captions/{number}")
        records.append(
            {
                "image_id": number,
                "file": _image_file(number),
                "captions": sample_captions(scene, config, rng, config.captions),
                "scene": scene.as_json(),
                "held_out": _has_held_out(scene, config),
            }
        )
    _write_compact(folder / "captions.json", records)


# ---- VQAv2 -------------------------------------------------------------------------------------------------


def sample_test_questions(config: SceneConfig, scene: Scene, number: int) -> list[SceneQuestion]:
    """Up to `questions` questions of different kinds, a relation first wherever the scene has one."""
    rng = _rng(config, f"test questions/{number}")
    rest = [kind for kind in QUESTION_KINDS if kind != "relation"]
    # few scenes allow a relation: it goes first, so that the limit never cuts it off
    kinds = ["relation", *rng.sample(rest, len(rest))]
    found = (sample_question(scene, config, rng, kind, config.pairs) for kind in kinds)
    return [question for question in found if question][: config.questions]


def _write_vqa(config: SceneConfig, scenes: list[Scene], folder: Path) -> None:
    head = {
        "info": {"description": "Questions about scenes of coloured shapes", "version": "1.0"},
        "data_type": "scenes",
        "data_subtype": _SUBTYPE,
        "license": {"name": "MIT"},
    }
    questions: list[_Record] = []
    annotations: list[_Record] = []
    for number, scene in enumerate(scenes):
        for question in sample_test_questions(config, scene, number):
            ids = {"image_id": number, "question_id": len(questions)}
            questions.append({**ids, "question": question.text})
            annotations.append(
                {
                    **ids,
                    "question_type": question.kind,
                    "answer_type": _ANSWER_TYPES.get(question.kind, "other"),
                    "multiple_choice_answer": question.answer,
                    # VQAv2's metric compares with ten annotators, who all agree here
                    "answers": [
                        {"answer": question.answer, "answer_confidence": "yes", "answer_id": i}
                        for i in range(1, 11)
                    ],
                    "held_out": _has_held_out(scene, config),
                }
            )
    task = {**head, "task_type": "Open-Ended"}
    _write_compact(folder / "v2_OpenEnded_scenes_test_questions.json", {**task, "questions": questions})
    _write_compact(folder / "v2_scenes_test_annotations.json", {**head, "annotations": annotations})


def _write_compact(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, separators=(",", ":")) + "\n")


# ---- POPE --------------------------------------------------------------------------------------------------


def _write_pope(config: SceneConfig, scenes: list[Scene], folder: Path) -> None:
    """One present and one absent object per image and category.

    Absent objects are (colour, shape) pairs, sampled from all of them ("random"), from the more frequent half
    in the test images ("popular"), or from those that share colour or shape with an object of the image
    ("adversarial": the counterpart of POPE's frequently co-occurring objects).
    """
    seen = Counter(obj.pair for scene in scenes for obj in scene.objects)
    ranked = sorted(config.pairs, key=lambda pair: (-seen[pair], pair))
    # at least one pair more than a scene can hold, so that one of them is absent
    popular = ranked[: max(len(ranked) // 2, config.max_objects + 1)]
    for category in _POPE_CATEGORIES:
        records: list[_Record] = []
        for number, scene in enumerate(scenes[: config.pope]):
            rng = _rng(config, f"pope {category}/{number}")
            absent = absent_pair(
                scene, rng, popular if category == "popular" else config.pairs, category == "adversarial"
            )
            for (color, shape), label in ((rng.choice(scene.objects).pair, "yes"), (absent, "no")):
                records.append(
                    {
                        "question_id": len(records) + 1,
                        "image": Path(_image_file(number)).name,
                        "text": f"Is there {a_or_an(f'{color} {shape}')} in the image?",
                        "label": label,
                    }
                )
        write_jsonl(folder / f"scenes_pope_{category}.json", records)


# ---- prompts for image generation --------------------------------------------------------------------------


def geneval_prompts(config: SceneConfig) -> list[_Record]:
    """Prompts in GenEval's layout, up to `prompts` per tag; GenEval's object class is a shape."""
    records: list[_Record] = []
    for tag, candidates in GENEVAL_PROMPTS.items():
        # candidates come in random order, the plainest phrases first; duplicates are dropped
        prompts: dict[str, _Record] = {}
        for prompt in candidates(config, _rng(config, f"geneval {tag}")):
            prompts.setdefault(prompt["prompt"], prompt)
        for prompt in _of_the_split(config, prompts, geneval_prompts):
            used = {(c["color"], c["class"]) for c in prompt["include"] if "color" in c}
            held_out = any(pair in config.held_out_pairs for pair in used)
            records.append({"tag": tag, **prompt, "held_out": held_out})
    return records


def _of_the_split(
    config: SceneConfig, prompts: dict[str, _Record], made: Callable[[SceneConfig], list[_Record]]
) -> list[_Record]:
    """Up to `prompts` of the candidates; for validation those that the test split lacks, if there are any."""
    if config.split == "validation":
        test = {record["prompt"] for record in made(replace(config, split="test"))}
        prompts = {text: prompt for text, prompt in prompts.items() if text not in test} or prompts
    return list(prompts.values())[: config.prompts]


def _shuffled(items: Iterable[Any], rng: Random) -> list[Any]:
    items = list(items)
    rng.shuffle(items)
    return items


def _prompt(include: list[_Record], prompt: str, exclude: Iterable[_Record] = ()) -> _Record:
    exclude = list(exclude)
    return {"include": include, **({"exclude": exclude} if exclude else {}), "prompt": prompt}


def _single(config: SceneConfig, rng: Random) -> Iterator[_Record]:
    frames = ("{}", "a picture of {}", "there is {}", "an image with {}")
    for frame in frames:
        for shape in _shuffled(config.shape_names, rng):
            yield _prompt([{"class": shape, "count": 1}], frame.format(a_or_an(shape)))
    for shape in _shuffled(config.shape_names, rng):
        yield _prompt([{"class": shape, "count": 1}], f"one {shape}")


def _two(config: SceneConfig, rng: Random) -> Iterator[_Record]:
    for frame in ("{}", "a picture of {}", "there is {}"):
        for pair in _shuffled(itertools.permutations(config.shape_names, 2), rng):
            include = [{"class": shape, "count": 1} for shape in pair]
            yield _prompt(include, frame.format(join_phrases([a_or_an(shape) for shape in pair])))


def _counting(config: SceneConfig, rng: Random) -> Iterator[_Record]:
    numbers = range(max(2, config.min_objects), config.max_objects + 1)
    for frame in ("{}", "a picture of {}"):
        for number, shape in _shuffled(itertools.product(numbers, config.shape_names), rng):
            # exactly `number`: one more is excluded
            include, exclude = {"class": shape, "count": number}, {"class": shape, "count": number + 1}
            yield _prompt([include], frame.format(with_count(shape, number)), [exclude])
    for number, (color, shape) in _shuffled(itertools.product(numbers, config.pairs), rng):
        include = {"class": shape, "count": number, "color": color}
        exclude = {"class": shape, "count": number + 1}
        yield _prompt([include], with_count(f"{color} {shape}", number), [exclude])


def _colors(config: SceneConfig, rng: Random) -> Iterator[_Record]:
    for frame in ("{}", "a picture of {}"):
        for color, shape in _shuffled(config.pairs, rng):
            include = {"class": shape, "count": 1, "color": color}
            yield _prompt([include], frame.format(a_or_an(f"{color} {shape}")))


def _position(config: SceneConfig, rng: Random) -> Iterator[_Record]:
    choices = itertools.product(itertools.permutations(config.shape_names, 2), RELATION_PHRASES)
    for (shape, target), relation in _shuffled(choices, rng):
        # GenEval's order: the target first; the second clause has its relation to clause 0
        include = [
            {"class": target, "count": 1},
            {"class": shape, "count": 1, "position": [_GENEVAL_RELATIONS[relation], 0]},
        ]
        yield _prompt(include, f"{a_or_an(shape)} {RELATION_PHRASES[relation]} {a_or_an(target)}")


def _attribution(config: SceneConfig, rng: Random) -> Iterator[_Record]:
    # different shapes and colours, so that swapped attributes are an error
    pairs = itertools.permutations(config.pairs, 2)
    for first, second in _shuffled([(a, b) for a, b in pairs if a[0] != b[0] and a[1] != b[1]], rng):
        include = [{"class": shape, "count": 1, "color": color} for color, shape in (first, second)]
        yield _prompt(
            include, join_phrases([a_or_an(f"{color} {shape}") for color, shape in (first, second)])
        )


_GENEVAL_RELATIONS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
GENEVAL_PROMPTS: dict[str, Callable[[SceneConfig, Random], Iterator[_Record]]] = {
    "single_object": _single,
    "two_object": _two,
    "counting": _counting,
    "colors": _colors,
    "position": _position,
    "color_attr": _attribution,
}


def class_records(config: SceneConfig) -> list[_Record]:
    """The colour and shape of every class, in the order of their labels."""
    return [
        {"label": label, "prompt": a_or_an(f"{color} {shape}"), "class": shape, "color": color}
        for label, (color, shape) in enumerate(config.class_pairs)
    ]


def write_attribute_prompts(config: SceneConfig, folder: Path) -> None:
    """Write attributes.jsonl where scenes have named sizes or textures and the file is missing."""
    prompts = attribute_prompts(config)
    if prompts and not (folder / "attributes.jsonl").exists():
        write_jsonl(folder / "attributes.jsonl", prompts)


def attribute_prompts(config: SceneConfig) -> list[_Record]:
    """Prompts for one object of a named size or texture, up to `prompts` per tag."""
    values = {"size": config.size_names, "texture": [t for t in config.textures if t != "plain"]}
    records: list[_Record] = []
    for tag, names in values.items():
        prompts = {}
        choices = itertools.product(names, config.pairs)
        for name, (color, shape) in _shuffled(choices, _rng(config, f"attributes {tag}")):
            text = a_or_an(f"{name} {color} {shape}")
            held_out = (color, shape) in config.held_out_pairs
            known = {"class": shape, "color": color, tag: name}
            prompts[text] = {"tag": tag, "prompt": text, **known, "held_out": held_out}
        records += _of_the_split(config, prompts, attribute_prompts)
    return records


def position_prompts(config: SceneConfig) -> list[_Record]:
    """A single object at every named position, in every colour and shape."""
    rng, records = _rng(config, "positions"), []
    cells = itertools.product(range(config.grid), repeat=2)
    for cell, (color, shape) in _shuffled(itertools.product(cells, config.pairs), rng):
        position = position_name(cell, config.grid)
        records.append(
            {
                "prompt": f"{a_or_an(f'{color} {shape}')} at the {position}",
                "class": shape,
                "color": color,
                "cell": list(cell),
                "position": position,
                "held_out": (color, shape) in config.held_out_pairs,
            }
        )
    return records
