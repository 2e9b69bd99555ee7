"""Scenes: rendering is deterministic, splits are disjoint, captions and answers are true."""

import collections
import hashlib
import json
import random
import re

import numpy as np
import pytest

from open_unitok.core.errors import UserError
from open_unitok.training.scenes import benchmark_files, captions, dataset, phrases, questions
from open_unitok.training.scenes.benchmark_files import sample_test_questions
from open_unitok.training.scenes.config import QUESTION_KINDS, SceneConfig, parse_shares, with_values
from open_unitok.training.scenes.scene import (
    object_centre,
    render_array,
    reserved_for_evaluation,
    sample_scene,
)
from open_unitok.training.scenes.shapes import COLORS

DEMO = SceneConfig()
RICH = SceneConfig(
    size=96,
    grid=3,
    max_objects=4,
    shapes=8,
    colors=10,
    sizes=(14, 18, 24),
    size_names=("small", "medium", "large"),
    textures=("plain", "striped", "dotted"),
    jitter=2,
    step=0.5,
    gradient=20,
)
# the settings of configs/scenes/questions.yaml
LAST_STAGE = {
    "question_shares": dict(zip(QUESTION_KINDS, (3, 3, 2, 2, 3, 4))),
    "short_names": True,
    "pair_captions": 6,
}
both = pytest.mark.parametrize("config", [DEMO, RICH], ids=["demo", "rich"])


@both
def test_a_scene_is_a_function_of_seed_split_and_index(config):
    for index in (0, 7):
        scene = sample_scene(config, "train", index)
        assert scene == sample_scene(config, "train", index)
        assert scene != sample_scene(config, "test", index)
        assert scene != sample_scene(with_values(config, {"seed": 1}), "train", index)
        assert (render_array(scene) == render_array(scene)).all()
        assert render_array(scene).shape == (config.size, config.size, 3)


def test_integers_and_floats_are_the_same_setting():
    same = with_values(DEMO, {"sizes": [10, 11.0, 12], "step": 1})
    assert same == DEMO and sample_scene(same, "test", 3) == sample_scene(DEMO, "test", 3)
    assert repr(sample_scene(same, "test", 3)) == repr(sample_scene(DEMO, "test", 3))


@both
def test_objects_have_their_colour_at_the_centre_and_stay_inside_their_cell(config):
    for index in range(60):
        scene = sample_scene(config, "train", index)
        image = render_array(scene).astype(int)
        rim = np.arange(config.size) % config.cell
        rim = (rim == 0) | (rim == config.cell - 1)
        background = np.array(scene.background)
        allowed = sum(map(abs, scene.gradient)) / 2 + 1
        assert abs(image[rim][:, rim] - background).max() <= allowed
        assert abs(image[rim] - background).max() <= allowed
        for obj in scene.objects:
            x, y = object_centre(obj, config.cell)
            if obj.shape != "ring" and obj.texture == "plain":
                assert tuple(image[int(y), int(x)]) == COLORS[obj.color]


@both
def test_splits_are_disjoint_and_training_lacks_the_held_out_pairs(config):
    train = [sample_scene(config, "train", i) for i in range(600)]
    test = [sample_scene(config, "test", i) for i in range(300)]
    assert not {s.objects for s in train} & {s.objects for s in test}
    assert all(reserved_for_evaluation(config, s) for s in test) and not any(
        reserved_for_evaluation(config, s) for s in train
    )
    assert len(config.held_out_pairs) == round(0.1 * len(config.pairs))
    seen = {obj.pair for scene in train for obj in scene.objects}
    assert seen == set(config.pairs) - config.held_out_pairs
    assert config.held_out_pairs <= {obj.pair for scene in test for obj in scene.objects}


def test_training_text_never_names_a_held_out_pair():
    names = [f"{color} {shape}" for color, shape in DEMO.held_out_pairs]
    for index in range(300):
        record = dataset.training_record(DEMO, index)[1]
        text = str(record["captions"]) + str(record["conversations"])
        assert not any(name in text for name in names)


@both
def test_captions_name_exactly_the_objects_of_the_scene(config):
    for index in range(200):
        scene, record = dataset.training_record(config, index)
        first = record["captions"][0]
        assert all(t.color in first and t.shape in first for t in scene.objects)
        for caption in record["captions"]:
            assert all(t.shape in caption for t in scene.objects)
            absent = set(config.shape_names) - {t.shape for t in scene.objects}
            assert not any(shape in caption for shape in absent)


def test_every_other_caption_leaves_out_sizes_and_textures():
    special = {*RICH.size_names, "striped", "dotted"}
    for index in range(100):
        scene, record = dataset.training_record(RICH, index)
        full, placed, plain, bare = [set(c.replace(",", "").split()) for c in record["captions"]]
        for obj in scene.objects:
            assert obj.size_name in full and obj.size_name in plain
            assert obj.texture == "plain" or obj.texture in full
            assert obj.color in placed and obj.color not in bare
        assert not special & placed and not special & bare


@pytest.mark.parametrize("grid", [2, 3])
def test_corners_are_named_only_where_every_object_is_in_one(grid):
    config = SceneConfig(corners=True, grid=grid, size=48)
    named = 0
    for index in range(300):
        scene, record = dataset.training_record(config, index)
        if any("corner" in caption for caption in record["captions"]):
            assert all(set(obj.cell) <= {0, grid - 1} for obj in scene.objects)
            named += 1
    assert named > 20
    assert "corner" not in str([dataset.training_record(DEMO, i)[1] for i in range(100)])


def expected_answer(question: str, scene) -> str | None:
    """The answer by filtering objects with the question's words; None for positions and relations."""
    words = question.strip("?").lower().split()
    singular = {phrases.plural(s): s for s in DEMO.shape_names}
    shape = next((singular.get(w, w) for w in words if singular.get(w, w) in DEMO.shape_names), None)
    color = next((w for w in words if w in DEMO.color_names), None)
    row = next((r for r, w in enumerate(("top", "bottom")) if w in words), None)
    column = next((c for c, w in enumerate(("left", "right")) if w in words), None)
    objects = [t for t in scene.objects if shape in (None, t.shape) and color in (None, t.color)]
    if words[0] == "how":
        return str(len(objects))
    if "color" in words or ("shape" in words and words[0] in ("what", "which")):
        if "at" in words:
            objects = [t for t in objects if t.cell == (row, column)]
        assert len(objects) == 1, "the question has one answer"
        return objects[0].color if "color" in words else objects[0].shape
    if " or " in question:
        return None
    return "yes" if objects else "no"


def test_answers_are_true():
    checked = collections.Counter()
    for index in range(400):
        scene = sample_scene(DEMO, "test", index)
        for question in sample_test_questions(DEMO, scene, index):
            assert len(question.answer.split()) == 1
            expected = expected_answer(question.text, scene)
            if expected is not None:
                assert question.answer == expected, (question, scene)
                checked[question.kind] += 1
            else:
                named = [t for t in scene.objects if t.name in question.text]
                named.sort(key=lambda t: question.text.index(t.name))
                (row, column), other = named[0].cell, named[-1].cell
                truth = {
                    "top": row == 0,
                    "bottom": row == 1,
                    "above": row < other[0],
                    "below": row > other[0],
                    "left": column < (1 if question.kind == "position" else other[1]),
                    "right": column > (0 if question.kind == "position" else other[1]),
                }
                assert truth[question.answer], (question, scene)
    assert min(checked[k] for k in ("existence", "count", "colour", "shape")) > 100


def named_objects(question: str, scene) -> list:
    """The objects that a question names, in the order of their names in the text."""
    names = [(obj, f"the {name}") for obj in scene.objects for name in questions.all_names(obj)]
    found = [(question.index(name), obj) for obj, name in names if name in question]
    return [obj for _, obj in sorted(found, key=lambda pair: pair[0])]


def test_short_names_are_used_only_where_they_are_unambiguous():
    config = with_values(
        RICH, {"grid": 2, "short_names": True, "question_shares": {"position": 1, "relation": 1}}
    )
    short = set()
    for index in range(150):
        scene = sample_scene(config, "train", index)
        conversation = questions.sample_conversation(scene, config, random.Random(index), config.pairs)
        assert sum(question.kind == "relation" for question in conversation) <= 1
        for question in conversation:
            first, *rest = named_objects(question.text, scene)
            assert len(rest) == (question.kind == "relation")
            if rest:
                assert question.answer in phrases.relations_between(first, rest[0])
            else:
                assert question.answer in phrases.position_name(first.cell, 2).split()
            names = f"the {first.shape}", f"the {first.color} object", f"the {first.color} {first.shape}"
            short.update(name for name in names if name in question.text)
    assert len(short) > 40


@pytest.mark.parametrize("grid", [2, 3])
def test_each_row_and_column_is_asked_for_once(grid):
    changes = {"grid": grid, "short_names": True, "ask_positions": True, "turns": 3}
    config, kinds = with_values(RICH, changes), collections.Counter()
    for index in range(200):
        scene = sample_scene(config, "train", index)
        conversation = questions.sample_conversation(scene, config, random.Random(index), config.pairs)
        asked, told = collections.Counter(), set()
        for question in conversation:
            kinds[question.kind] += 1
            axis = int("left" in question.text)  # 1: the column is asked for
            if question.kind in ("position", "relation"):
                asked.update((obj, axis) for obj in named_objects(question.text, scene))
            elif "object at the" in question.text:
                words = question.text.split("object at the ")[1].removesuffix(" have?").strip("?")
                told |= {obj for obj in scene.objects if phrases.position_name(obj.cell, grid) == words}
        assert max(asked.values(), default=1) == 1  # on a 2 x 2 grid a relation tells both columns
        assert not told & {obj for obj, _ in asked}
        unique = questions._unique_names(scene, questions.all_names)
        assert asked.keys() == {(obj, axis) for obj in unique if obj not in told for axis in (0, 1)}
    assert kinds.keys() == set(QUESTION_KINDS) and kinds["position"] > kinds["relation"] > 100


def test_partial_captions_name_some_attributes():
    config, seen = with_values(RICH, {"partial_captions": 6}), collections.Counter()
    for index in range(60):
        scene, record = dataset.training_record(config, index)
        plain = dataset.training_record(RICH, index)[1]["captions"]
        assert record["captions"][: len(plain)] == plain and len(record["captions"]) == len(plain) + 6
        for caption in record["captions"][len(plain) :]:
            known = {
                "color": config.color_names,
                "shape": config.shape_names,
                "size_name": config.size_names,
                "texture": config.textures[1:],
            }
            named = set(re.findall("[a-z]+", re.sub(r"(cross|[a-z]+?)e?s\b", r"\1", f" {caption} ")))
            for kind, words in known.items():
                told = {word for word in words if word in named}
                assert told <= {getattr(obj, kind) for obj in scene.objects}
                seen[kind] += len(told)
            if len(scene.objects) == 1:  # the words of one object, in the order of its full name
                said = [word for word in caption.split() if word in scene.objects[0].words]
                assert said == [word for word in scene.objects[0].words if word in said] != []
    assert min(seen.values()) > 100 and seen["shape"] < 700


def test_captions_in_reading_order_name_the_objects_from_left_to_right_and_from_top_to_bottom():
    config, listed = with_values(DEMO, {"reading_order": True, "captions": 8}), collections.Counter()
    for index in range(200):
        scene, record = dataset.training_record(config, index)
        for caption in record["captions"] if len(scene.objects) == 2 else ():
            first, second = (caption.find(obj.shape) for obj in scene.objects)
            told = any(word in caption for word in ("top", "bottom", "left", "right", "above", "below"))
            if scene.objects[0].shape != scene.objects[1].shape and not told:
                assert first < second
            listed[told, first < second] += 1
    assert listed[True, False] > 100 and listed[False, True] > 100  # captions with places are in any order


def test_question_shares_and_pair_captions():
    config = with_values(RICH, {"question_shares": {"count": 2, "shape": 1}, "pair_captions": 6})
    kinds, related = collections.Counter(), 0
    for index in range(200):
        scene, record = dataset.training_record(config, index)
        plain = dataset.training_record(RICH, index)[1]["captions"]
        assert record["captions"][: len(plain)] == plain
        more = record["captions"][len(plain) :]
        assert len(more) == (6 if len(scene.objects) == 2 else 0)
        for caption in more:
            first, *others = sorted(scene.objects, key=lambda t: caption.index(t.shape))
            for word, phrase in phrases.RELATION_PHRASES.items():
                if phrase in caption and first.shape != others[0].shape:
                    assert word in phrases.relations_between(first, others[0])
                    related += 1
        conversation = questions.sample_conversation(scene, config, random.Random(index), config.pairs)
        kinds.update(question.kind for question in conversation)
    assert related > 50 and kinds.keys() == {"count", "shape"} and kinds["count"] > kinds["shape"] > 50


def test_the_shipped_models_test_split_is_frozen():
    config = dataset.load_config("configs/scenes/scenes.yaml")
    content: list = [benchmark_files.geneval_prompts(config), benchmark_files.position_prompts(config)]
    for index in range(config.test):
        scene = sample_scene(config, "test", index)
        words = captions.sample_captions(scene, config, random.Random(index), config.captions)
        pixels = hashlib.sha256(render_array(scene).tobytes()).hexdigest() if index < 40 else ""
        content.append([scene.as_json(), sample_test_questions(config, scene, index), words, pixels])
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    assert digest == "47713404c503aa8b101dff9229be88fa6decc46325ea6b96e145a0bdcd0e8e8c"


@pytest.mark.parametrize(
    ("file", "changes", "expected"),
    [
        ("demo", {}, "40b5d5cb0c5ce3060e5d6fcce7f1393319313e018be79e1266b08a86af6e9415"),
        (
            "demo",
            {"ask_positions": False},
            "9a0b15ef109e75c3d1f19c2a6d0fd5ac4d81e8d1ca0c206d9f844b03ebabb9b1",
        ),
        ("scenes", {}, "5af4c6d2fcc9418bcd4db9e57ded0608dc4560655ba36e01691d87d42613f254"),
        ("scenes", LAST_STAGE, "587f81f186ca6f7ea4b2f89722d871fb1dc28408686972c78af52b4619eb3e47"),
    ],
)
def test_training_data_of_shipped_configs_is_frozen(file, changes, expected):
    config = with_values(dataset.load_config(f"configs/{file}/scenes.yaml"), changes)
    content = []
    for index in range(60):
        scene, record = dataset.training_record(config, index)
        content.append([record, hashlib.sha256(render_array(scene).tobytes()).hexdigest()])
    lines = captions.sample_sentences(config, (sample_scene(config, "train", i) for i in range(60)),
                                      random.Random(0))  # fmt: skip
    digest = hashlib.sha256(json.dumps([content, list(lines)], sort_keys=True).encode()).hexdigest()
    assert digest == expected


def test_questions_are_balanced():
    answers = collections.defaultdict(collections.Counter)
    for index in range(800):
        for question in sample_test_questions(DEMO, sample_scene(DEMO, "test", index), index):
            answers[question.kind][question.answer] += 1
    assert answers.keys() == set(QUESTION_KINDS)
    best = {kind: max(c.values()) / sum(c.values()) for kind, c in answers.items()}
    assert 0.45 < answers["existence"]["yes"] / sum(answers["existence"].values()) < 0.55
    limits = {
        "existence": 0.55,
        "count": 0.5,
        "colour": 0.25,
        "shape": 0.35,
        "position": 0.35,
        "relation": 0.35,
    }
    assert {kind for kind in best if best[kind] > limits.get(kind, 0.35)} == set()


def test_shares_on_the_command_line():
    assert parse_shares(["count=2", "shape=0.5"]) == {"count": 2.0, "shape": 0.5}
    for word in ("count", "count=", "=x", "count=a"):
        with pytest.raises(UserError, match=f"'{word}' must be KIND=NUMBER"):
            parse_shares([word])


def test_positions_and_articles():
    assert phrases.position_name((0, 1), 2) == "top right"
    assert [phrases.position_name((r, 1), 3) for r in range(3)] == ["top", "middle", "bottom"]
    assert phrases.with_count("orange cross", 2) == "two orange crosses"
    assert phrases.a_or_an("orange circle") == "an orange circle"


@both
def test_sentences_are_diverse(config):
    scenes = (sample_scene(config, "train", i) for i in range(200))
    lines = list(captions.sample_sentences(config, scenes, random.Random(0)))
    assert len(lines) == 200 and len(set(lines)) > 60
    assert all(line.endswith(".") for line in lines)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sise": 32}, "Did you mean 'size'?"),
        ({"size": 33}, "size = 33"),
        ({"grid": 0}, "expected 2 or 3"),
        ({"size": "32"}, "whole number"),
        ({"size": True}, "whole number"),
        ({"sizes": [10, 16]}, "stay in their cells"),
        ({"sizes": 10}, "list of numbers"),
        ({"corners": 1}, "true or false"),
        ({"max_objects": 5}, "at most one per cell"),
        ({"min_objects": 3}, "1 to max_objects"),
        ({"shapes": 9}, "2 to 8"),
        ({"textures": ["checked"]}, "striped"),
        ({"size_names": ["small"]}, "one per size"),
        ({"asked": [3, 3, 2, 2, 3, 4]}, "'asked' is not a setting"),
        ({"question_shares": [1, 1]}, "a mapping of existence, count"),
        ({"question_shares": {"colour": "x"}}, "a mapping of existence, count"),
        ({"question_shares": {"color": 1}}, "'color' is not a kind of question. Did you mean 'colour'?"),
        ({"question_shares": {"size": 1}}, "Allowed: colour, count, existence"),
        ({"question_shares": {}}, "at least one of them above 0"),
        ({"question_shares": {"count": 0}}, "at least one of them above 0"),
        ({"question_shares": {"count": float("inf")}}, "finite numbers"),
        ({"question_shares": {"count": 2, "shape": -1}}, "numbers of 0 or more"),
        ({"pair_captions": -1}, "0 or more"),
        ({"held_out": 0.9}, "0 to 0.5"),
        ({"held_out": float("nan")}, "0 to 0.5"),
    ],
)
def test_invalid_settings_are_rejected(values, words):
    with pytest.raises(UserError, match=words):
        with_values(DEMO, values)


def test_validation_shares_no_arrangement_and_few_prompts_with_test():
    config = dataset.load_config("configs/scenes/scenes.yaml")
    config = with_values(config, {"test": 300, "train": 300})
    other = with_values(config, {"split": "validation"})
    splits = {c.split: benchmark_files.evaluation_scenes(c) for c in (config, other)}
    objects = {name: {scene.objects for scene in scenes} for name, scenes in splits.items()}
    train = {sample_scene(config, "train", index).objects for index in range(300)}
    assert len(splits["validation"]) == 300 and not objects["validation"] & (objects["test"] | train)
    assert all(reserved_for_evaluation(config, scene) for scene in splits["validation"])
    prompts = {
        c.split: collections.defaultdict(set)
        for c in (config, other)
    }  # fmt: skip
    for c in (config, other):
        for record in benchmark_files.geneval_prompts(c):
            prompts[c.split][record["tag"]].add(record["prompt"])
    shared = {tag for tag, known in prompts["test"].items() if known & prompts["validation"][tag]}
    assert shared == {"single_object"}  # the test split has all of its forty prompts
    assert all(len(found) >= 40 for found in prompts["validation"].values())
    questions_of = [
        [sample_test_questions(c, scene, n) for n, scene in enumerate(splits["test"][:20])]
        for c in (config, other)
    ]
    assert questions_of[0] != questions_of[1]


def test_the_validation_split_and_attribute_prompts_are_frozen():
    config = dataset.load_config("configs/scenes/scenes.yaml")
    other = with_values(config, {"split": "validation"})
    content: list = [benchmark_files.attribute_prompts(config), benchmark_files.attribute_prompts(other)]
    content += [benchmark_files.geneval_prompts(other), benchmark_files.position_prompts(other)]
    for index, scene in enumerate(benchmark_files.evaluation_scenes(other)):
        content.append([scene.as_json(), sample_test_questions(other, scene, index)])
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    assert digest == "4052b5c7c47f230b248d4303450d9cafc8f5f0e3b545260f7e0978cb3fcc4c37"


def test_attribute_prompts_name_one_object_with_a_size_or_texture():
    config = dataset.load_config("configs/scenes/scenes.yaml")
    records = benchmark_files.attribute_prompts(config)
    tags = collections.Counter(record["tag"] for record in records)
    assert tags == {"size": config.prompts, "texture": config.prompts}
    assert len({record["prompt"] for record in records}) == len(records)
    for record in records:
        words = record["prompt"].split()
        assert words[1:] == [record[record["tag"]], record["color"], record["class"]] and words[0] in (
            "a",
            "an",
        )
        assert record["held_out"] == ((record["color"], record["class"]) in config.held_out_pairs)
    assert benchmark_files.attribute_prompts(SceneConfig()) == []  # the demo's objects have neither
