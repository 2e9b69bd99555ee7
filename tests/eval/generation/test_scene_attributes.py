"""Sizes and textures of generated scenes: an oracle, wrong attributes, surplus objects, missing textures."""

import json

import numpy as np
import pytest

from open_unitok.core.errors import UserError
from open_unitok.eval.core.model import Reconstructions
from open_unitok.eval.generation.scene_attributes import judge_attributes
from open_unitok.training.scenes.config import SceneConfig
from open_unitok.training.scenes.dataset import write_scenes
from open_unitok.training.scenes.scene import Scene, SceneObject, render

from ..conftest import run_named, score_folder

SIZES = {"small": 16.0, "medium": 20.0, "large": 25.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attributes") / "data"
    config = SceneConfig(
        size=64, sizes=tuple(SIZES.values()), size_names=tuple(SIZES),
        textures=("plain", "striped", "dotted"),
        train=4, shard=4, test=60, pope=2, prompts=12, text_lines=20, questions=1,
    )  # fmt: skip
    write_scenes(config, folder, progress=False)
    return folder


class Painter:
    """Renders its prompt; `change` replaces fields of the object, `second` adds another one."""

    def __init__(self, second=False, **change):
        self.change, self.second = change, second

    def describe(self):
        return {"path": "painter", "kind": "mllm", "fingerprint": "0"}

    def generate(self, prompts, seeds):
        return [self.paint(prompt.split()[1:]) for prompt in prompts]

    def paint(self, words):
        attribute, color, shape = words
        known = {
            "size": SIZES.get(attribute, 20.0),
            "texture": attribute if attribute not in SIZES else "plain",
        }
        wanted = {"shape": shape, "color": color, "cell": (0, 1), **known} | self.change
        first = SceneObject(**wanted)
        more = (SceneObject(shape, color, 20.0, (1, 1)),) if self.second else ()
        return render(Scene(64, 2, (first, *more), (240, 240, 240)))

    def reconstruct(self, images, reencode=False):
        decoded = np.stack([np.asarray(image) for image in images])
        return Reconstructions(decoded, decoded, np.zeros((len(images), 4, 2), int), 8)


@pytest.mark.parametrize(
    ("painter", "size", "texture"),
    [
        (Painter(), 1.0, 1.0),
        (Painter(size=16.0), None, 1.0),
        (Painter(texture="dotted"), 1.0, None),
        (Painter(texture="plain"), 1.0, 0.0),
        (Painter(second=True), 0.0, 0.0),
        (Painter(color="red"), None, None),
    ],
)
def test_known_images_get_known_scores(data, tmp_path, painter, size, texture):
    result = run_named("scene_attributes", painter, data, tmp_path, quiet=True)
    metrics = result["metrics"]
    for tag, expected in (("size", size), ("texture", texture)):
        value = metrics[f"tag/{tag}"]["value"]
        assert value == expected if expected is not None else 0 < value < 1
    assert metrics["ceiling"]["value"] == 1.0 and not result["comparable"]


def test_the_nearest_size_counts():
    known = {"class": "circle", "color": "red", "size": "small"}
    prompt = {"tag": "size", "prompt": "a small red circle", **known}
    for side, right in ((15.5, True), (17.9, True), (18.1, False), (25.0, False)):
        found = {"detections": {"circle": [[0, 0, side, side, 1.0]]}, "colors": {"circle": ["red"]}}
        assert judge_attributes(prompt, found, SIZES).correct == right


def test_detections_without_textures_are_no_score(data, tmp_path):
    run_named("scene_attributes", Painter(), data, tmp_path, quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "answers-00000.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("textures", None)
    (tmp_path / "detections.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="have no textures"):
        score_folder(tmp_path)


def test_data_without_sizes_and_textures_says_so(tmp_path):
    config = SceneConfig(train=4, shard=4, test=4, pope=2, prompts=2, text_lines=20, questions=1)
    write_scenes(config, tmp_path / "data", progress=False)
    with pytest.raises(UserError, match=r"attributes\.jsonl.*if sizes or textures"):
        run_named("scene_attributes", Painter(), tmp_path / "data", tmp_path / "out", quiet=True)
