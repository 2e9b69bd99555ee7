"""The model in the box: small, found by its name, and able to draw and to answer."""

import pytest
from PIL import Image

from open_unitok import Pipeline, Sampling
from open_unitok.eval.scenes_detector import ScenesDetector, only_object
from open_unitok.files import MODELS, SHIPPED, write_json
from open_unitok.training.scene_world import render, sample_scene
from open_unitok.training.scenes import describe, load_config

CONFIG = load_config("configs/scenes/scenes.yaml")


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.from_pretrained(SHIPPED, device="cpu")


def test_it_is_small_and_says_what_it_is():
    files = [file for file in (MODELS / SHIPPED).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 16e6
    assert "make model" in (MODELS / SHIPPED / "README.md").read_text()
    assert (MODELS / SHIPPED / "unitok" / "caption_tokenizer" / "tokenizer.model").exists()
    assert Sampling.of_model(MODELS / SHIPPED) != Sampling()


def test_it_draws_what_is_asked_for(pipe, tmp_path):
    write_json(tmp_path / "scenes.json", describe(CONFIG))
    detect = ScenesDetector.from_file(tmp_path / "scenes.json")
    held_out = {(color, shape) for color, shape in CONFIG.held_out_pairs}
    wanted = [pair for pair in CONFIG.pairs if pair not in held_out][::4]
    pictures = pipe.generate([f"a {color} {shape}" for color, shape in wanted], seed=0)
    hits = [only_object(found, shape, color) for found, (color, shape) in zip(detect(pictures), wanted)]
    assert len(hits) > 15 and sum(hits) > 0.75 * len(hits)


def test_it_answers_about_scenes_of_the_test_split(pipe):
    scenes = [sample_scene(CONFIG, "test", index) for index in range(60)]
    pictures: list[Image.Image] = [render(scene) for scene in scenes]
    answers = pipe.answer(pictures, ["How many objects are there?"] * len(scenes), max_new_tokens=4)
    right = [answer == str(len(scene.things)) for answer, scene in zip(answers, scenes)]
    assert sum(right) > 0.6 * len(right)
