"""Malformed entries in the scenes' own files: named and counted as wrong, or left out of the ceiling."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from open_unitok.core.errors import UserError

from ..conftest import run_named
from .test_runs import QUIET, Scripted, data

assert data  # the fixture: a folder of scenes

FAULTS = {
    "no object": 5,
    "an error of spelling": {"file": "a.png", "scenes": {}},
    "no file": {"file": 7, "scene": {"objects": []}},
    "objects that are none": {"file": "a.png", "scene": {"objects": 5}},
    "an object without a colour": {"file": "a.png", "scene": {"objects": [{"shape": "star"}]}},
    "a cell that is none": {
        "file": "a.png",
        "scene": {"objects": [{"shape": "star", "color": "red", "cell": 3, "box": [0, 0, 1, 1]}]},
    },
}
UNKNOWN = {
    "file": "a.png",
    "scene": {"objects": [{"shape": "hat", "color": "red", "cell": [0, 0], "box": [0, 0, 1, 1]}]},
}
EMPTY = {"file": "a.png", "captions": ["nothing"], "scene": {"objects": []}}


@pytest.fixture
def own(data, tmp_path):
    """A copy of the scenes data set for tests that damage it."""
    shutil.copytree(data, tmp_path / "data")
    return tmp_path / "data"


def spoil(path, value):
    """Put `value` before the entries of a JSON list."""
    path.write_text(json.dumps([value, *json.loads(path.read_text())]))


@pytest.mark.parametrize("fault", [*FAULTS, "an unknown shape"])
def test_zeroshot_counts_a_malformed_scene_as_wrong(own, tmp_path, fault):
    whole = run_named("zeroshot", Scripted(own), own, tmp_path / "a", **QUIET)
    spoil(own / "test" / "captions.json", UNKNOWN if fault == "an unknown shape" else FAULTS[fault])
    result = run_named("zeroshot", Scripted(own), own, tmp_path / "b", **QUIET)
    n = whole["metrics"]["top5"]["n"]
    assert result["malformed"] == 1 and result["metrics"]["top5"]["n"] == n + 1
    assert result["metrics"]["top5"]["value"] == pytest.approx(
        whole["metrics"]["top5"]["value"] * n / (n + 1)
    )


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["geneval", "positions"])
def test_a_malformed_scene_is_left_out_of_the_ceiling(own, tmp_path, name, fault):
    spoil(own / "test" / "captions.json", FAULTS[fault])
    result = run_named(name, Scripted(own), own, tmp_path / "o", **QUIET)
    assert result["details"]["ceiling_overall"] == 1.0 and result["value"] == 0.0
    assert any("1 images are left out of the ceiling" in p and "entry 0" in p for p in result["problems"])


def test_a_scene_without_objects_is_not_reconstructed(own, tmp_path):
    whole = run_named("positions", Scripted(own), own, tmp_path / "a", **QUIET)
    spoil(own / "test" / "captions.json", EMPTY)
    result = run_named("positions", Scripted(own), own, tmp_path / "b", **QUIET)
    assert result["metrics"] == whole["metrics"] and not result["problems"]


def words_of(scripted):
    scripted.embed_images = lambda images: np.eye(64)[[0] * len(images)]
    scripted.embed_texts = lambda texts: np.eye(64)[[0] * len(texts)]
    return scripted


@pytest.mark.parametrize(
    "fault", [5, {"file": 7, "captions": ["a"]}, {"file": "a.png"}, {"file": "a.png", "captions": [None]}]
)
def test_retrieval_counts_a_malformed_entry_as_never_found(own, tmp_path, fault):
    spoil(own / "test" / "captions.json", fault)
    result = run_named("retrieval", words_of(Scripted(own)), own, tmp_path / "o", **QUIET)
    rows = [json.loads(line) for line in (tmp_path / "o" / "scores.jsonl").read_text().splitlines()]
    assert result["malformed"] == 1 and rows[0]["score"] == 0.0 and result["n"] == 41


@pytest.mark.parametrize("fault", ["{oops", "5", '{"prompt": "a star"}', '{"prompt": "a", "cell": "x"}'])
def test_a_malformed_position_is_wrong(own, tmp_path, fault):
    path = own / "test" / "positions.jsonl"
    n = len(path.read_text().splitlines())
    path.write_text(fault + "\n" + path.read_text())
    result = run_named("positions", Scripted(own), own, tmp_path / "o", **QUIET)
    assert result["malformed"] == 1 and result["metadata"]["prompts"] == n + 1
    assert result["metrics"]["ceiling"]["value"] == 1.0


def test_detections_without_colours_are_scored(own, tmp_path):
    settings = {"detector": "none"}
    with pytest.raises(UserError, match="have no detections"):
        run_named("positions", Scripted(own), own, tmp_path, settings, **QUIET)
    row = {"index": 0, "detections": {"star": [[0, 0, 9, 9, 0.95]]}}
    (tmp_path / "detections.jsonl").write_text(json.dumps(row) + "\n")
    assert run_named("positions", Scripted(own), own, tmp_path, settings, **QUIET)["value"] == 0.0


def test_an_image_of_another_size_is_named_and_wrong(own, tmp_path):
    scripted = Scripted(own)
    sizes = iter((16, 32, 48))
    scripted.generate = lambda prompts, seeds: [Image.new("RGB", (next(sizes, 32),) * 2) for _ in prompts]
    result = run_named("geneval", scripted, own, tmp_path / "o", **QUIET)
    assert result["failed"] == 2 and result["details"]["ceiling_overall"] == 1.0
    assert any("(16, 16, 3)" in problem for problem in result["problems"])


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *(("zeroshot", key) for key in ("palette", "outlines")),
        *(("geneval", key) for key in ("palette", "outlines", "size")),
        *(("positions", key) for key in ("size", "grid")),
    ],
)
def test_scenes_that_are_none_are_one_line(own, tmp_path, name, key):
    scenes = json.loads((own / "scenes.json").read_text())
    (own / "scenes.json").write_text(json.dumps(scenes | {key: "x"}))
    with pytest.raises(UserError, match=r"scenes\.json"):
        run_named(name, Scripted(own), own, tmp_path / "o", **QUIET)
