"""Zero-shot classification with a class list, with a folder for every class, for some, or for none."""

import json

import numpy as np
import pytest
from PIL import Image

from open_unitok.core.errors import UserError

from ..conftest import run_named

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class Seer:
    """Embeds an image by its colour, and a text by the name of the colour in it; other names embed apart."""

    device = "cpu"

    def describe(self):
        return {"path": "seer", "kind": "tokenizer", "fingerprint": "0"}

    def embed_images(self, images):
        pixels = np.array([np.asarray(image)[0, 0] for image in images], float)
        return np.hstack([pixels / 255, np.zeros((len(images), 1))])

    def embed_texts(self, texts):
        words = [next((c for c in COLOURS if c in text), "") for text in texts]
        return np.array([[*(v / 255 for v in COLOURS[w]), 0] if w else [0, 0, 0, 1] for w in words])


def save(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), COLOURS[colour]).save(path)


def run(data, out, **options):
    return run_named("zeroshot", Seer(), data, out, options, quiet=True)


@pytest.mark.parametrize(
    "content",
    [
        {"classes": {"a": "red thing", "b": "green thing", "c": "blue thing", "d": "dog"}},
        {"a": "red thing", "b": "green thing", "c": "blue thing", "d": "dog"},
        {"classes": {"a": "red", "b": "green", "c": "blue", "d": "dog"}, "templates": ["a {}"]},
    ],
)
@pytest.mark.parametrize("inside", ["", "val"])
def test_a_class_needs_no_folder(tmp_path, content, inside):
    data = tmp_path / "data"
    save(data / inside / "a" / "1.png", "red")
    save(data / inside / "b" / "1.PNG", "green")
    save(data / inside / "b" / "2.png", "red")
    (data / "classes.json").write_text(json.dumps(content))
    result = run(data, tmp_path / "out")
    assert result["value"] == pytest.approx(2 / 3) and result["n"] == 3
    assert result["metadata"]["classes"] == 4 and result["details"]["chance"] == 1 / 4
    names = list((content.get("classes") or content).values())
    assert result["problems"] == [f"2 classes have no images, for instance {names[2]}"]
    # five of four classes are always right
    assert list(result["metrics"]) == ["top1"]


def test_names_and_a_list_of_images(tmp_path):
    data = tmp_path / "data"
    for i, colour in enumerate(("red", "green", "blue", "red")):
        save(data / "images" / f"{i}.png", colour)
    images = {"0.png": "red", "images/1.png": "green", "2.png": "red", "3.png": "pink"}
    content = {"classes": [*COLOURS, "cat", "dog", "cow"], "images": images}
    (data / "classes.json").write_text(json.dumps(content))
    result = run(data, tmp_path / "out")
    assert result["value"] == 2 / 4 and result["malformed"] == 1 and "top5" in result["metrics"]
    assert "3.png is of class 'pink', which classes lacks" in result["problems"][0]


def test_a_text_file_of_names(tmp_path):
    for colour in ("red", "blue"):
        save(tmp_path / "data" / colour / "x.png", colour)
    (tmp_path / "data" / "classes.txt").write_bytes("\ufeffred\r\ngreen\r\n\r\nblue\r\n".encode())
    result = run(tmp_path / "data", tmp_path / "out")
    assert result["value"] == 1.0 and result["metadata"]["classes"] == 3
    assert run(tmp_path / "data" / "classes.txt", tmp_path / "other")["value"] == 1.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "classes must be two names or more"),
        (["one"], "classes must be two names or more"),
        (["red", 5], "classes must be two names or more"),
        (["red", "green"], "there are no images of its 2 classes"),
        ({"classes": ["red", "green"], "templates": ["a"]}, "must contain {} exactly once"),
        ({"classes": "red"}, "classes: expected an object"),
        ({"classes": ["red", "green"], "images": []}, "there are no images of its 2 classes"),
    ],
)
def test_a_wrong_list_is_one_line(tmp_path, content, message):
    (tmp_path / "classes.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message.replace("{}", r"\{\}")):
        run(tmp_path, tmp_path / "out")
