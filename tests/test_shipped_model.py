"""The shipped models: small, found by their names, generate and answer."""

import collections

import numpy as np
import pytest
from PIL import Image

from open_unitok import Pipeline, Sampling
from open_unitok.core.files import DEFAULT_MODEL, REPLAY_FOLDER, SHIPPED_MODELS, write_json
from open_unitok.eval.judges.scenes_detector import ScenesDetector, only_object
from open_unitok.training.data.code_shards import CodeFolder
from open_unitok.training.data.mixture_options import read_replay
from open_unitok.training.emoji.packages import EMOJI_PACKAGES
from open_unitok.training.run import load_run_config
from open_unitok.training.scenes.benchmark_files import sample_test_questions
from open_unitok.training.scenes.dataset import load_config, scenes_description
from open_unitok.training.scenes.scene import render, sample_scene

CONFIG = load_config("configs/scenes/scenes.yaml")


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.from_pretrained(DEFAULT_MODEL, device="cpu")


def test_it_is_small_and_has_a_card():
    files = [file for file in (SHIPPED_MODELS / DEFAULT_MODEL).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 16e6
    assert "make model" in (SHIPPED_MODELS / DEFAULT_MODEL / "README.md").read_text()
    assert (SHIPPED_MODELS / DEFAULT_MODEL / "unitok" / "caption_tokenizer" / "tokenizer.model").exists()
    assert Sampling.from_folder(SHIPPED_MODELS / DEFAULT_MODEL) != Sampling()


def test_it_ships_some_of_its_training_data(pipe):
    """`data.replay`: codes of training scenes by the shipped tokenizer, never of the test split."""
    folder = SHIPPED_MODELS / DEFAULT_MODEL / REPLAY_FOLDER
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 200e3
    kinds = {entry.kind: entry.weight for entry in read_replay(folder)}
    trained = load_run_config("configs/scenes/captions.yaml", []).data.mixture
    assert kinds.keys() == {entry.kind for entry in trained} and sum(kinds.values()) == pytest.approx(1)
    codes = CodeFolder(folder, pipe.unitok.fingerprint())
    assert len(codes) >= 1000
    samples = [codes.read(0, number) for number in range(0, len(codes), 100)]
    images = [render(sample_scene(CONFIG, "train", int(sample.key))) for sample in samples]
    expected = pipe.encode_for_reading(images).codes.numpy()
    stored = np.stack([sample.codes for sample in samples])
    assert (stored == expected).mean() > 0.98  # a processor may round to a neighbouring entry
    assert all(len(sample.info[name]) == 1 for sample in samples for name in ("captions", "conversations"))


def test_it_generates_the_object_of_the_prompt(pipe, tmp_path):
    write_json(tmp_path / "scenes.json", scenes_description(CONFIG))
    detect = ScenesDetector.from_file(tmp_path / "scenes.json")
    held_out = {(color, shape) for color, shape in CONFIG.held_out_pairs}
    wanted = [pair for pair in CONFIG.pairs if pair not in held_out][::4]
    images = pipe.generate([f"a {color} {shape}" for color, shape in wanted], seed=0)
    hits = [only_object(found, shape, color) for found, (color, shape) in zip(detect(images), wanted)]
    assert len(hits) > 15 and sum(hits) > 0.75 * len(hits)


def test_it_answers_questions_of_the_test_split(pipe):
    scenes = [sample_scene(CONFIG, "test", index) for index in range(60)]
    samples = [
        (render(scene), q) for i, scene in enumerate(scenes) for q in sample_test_questions(CONFIG, scene, i)
    ]
    images: list[Image.Image] = [image for image, _ in samples]
    answers = pipe.answer(images, [question.text for _, question in samples], max_new_tokens=4)
    hits = collections.defaultdict(list)
    for answer, (_, question) in zip(answers, samples):
        hits[question.kind].append(answer == question.answer)
    easy = [hit for kind in ("existence", "count", "colour", "shape") for hit in hits[kind]]
    assert len(easy) > 100 and sum(easy) > 0.9 * len(easy)
    assert sum(hits["position"]) > 0.6 * len(hits["position"])


# ---- emoji -------------------------------------------------------------------------------------------------

EMOJI = SHIPPED_MODELS / "emoji"


@pytest.fixture(scope="module")
def emoji():
    return Pipeline.from_pretrained("emoji", device="cpu")


def test_emoji_are_small_and_come_with_their_licences():
    files = [file for file in EMOJI.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 16e6
    card = (EMOJI / "README.md").read_text()
    assert "make emoji" in card
    for package in EMOJI_PACKAGES:  # what is not attributed must not be in the weights
        assert (package.attribution in card) == (package.style in ("google", "twitter"))
    for licence, words in LICENCES.items():
        assert f"licenses/{licence}" in card and words in (EMOJI / "licenses" / licence).read_text()
    assert Sampling.from_folder(EMOJI) != Sampling()


LICENCES = {
    "Apache-2.0.txt": "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION",
    "CC-BY-4.0.txt": "Creative Commons Attribution 4.0 International Public License",
    "MIT.txt": "Copyright (c) 2013 Cal Henderson",
}


# fifty of the 1,384 names that are trained in both styles, chosen at random
NAMES = (
    "montserrat flag, open file folder, bicycle, honeybee, shaking face, ribbon, nicaragua flag, large "
    "orange circle, racing car, man tipping hand, test tube, front-facing baby chick, sauropod, "
    "department store, jeans, derelict house, circled ideograph congratulation, wallis & futuna flag, "
    "heavy dollar sign, snow-capped mountain, tuvalu flag, dominica flag, ledger, clock face eight "
    "oclock, camera, mahjong tile red dragon, pretzel, standing person, clock face five oclock, man "
    "shrugging, part alternation mark, leopard, upside-down face, woman feeding baby, first quarter moon "
    "symbol, squared katakana sa, person in manual wheelchair facing right, skier, hot beverage, bread, "
    "squared cjk unified ideograph-6307, ascension island flag, cinema, negative squared latin capital "
    "letter o, wood, western sahara flag, aerial tramway, uzbekistan flag, romania flag, malta flag"
)


def test_emoji_names_what_it_generates(emoji):
    """The originals are not here: a second reading of the codes stands for them."""
    pairs = [(name, style) for name in NAMES.split(", ") for style in ("Google", "Twitter")]
    images = emoji.generate([f"{name}, {style} style" for name, style in pairs], seed=0)
    assert images[0].size == (64, 64)
    for k, question, least in [(0, "What is this?", 92), (1, "Which style is it?", 73)]:
        told = emoji.answer(images, [question] * len(images), max_new_tokens=16)
        assert sum(a == pair[k] for a, pair in zip(told, pairs)) >= least, told
