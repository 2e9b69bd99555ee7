"""Zero-shot classification with a class list, with a folder for every class, for some, or for none."""

import json
import re
import tarfile

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


# ---- linear probe ----------------------------------------------------------------------------------------


class Colours:
    """Features are the colour of the first pixel."""

    device = "cpu"

    def describe(self):
        return {"path": "colours", "kind": "tokenizer", "fingerprint": "0"}

    def features(self, images, pooling):
        return np.array([np.asarray(image)[0, 0] for image in images], np.float32) / 255


def write_lists(folder, **changes):
    """train/list.json with images in a tar, test/list.json with files and its classes in another order."""
    (folder / "train").mkdir()
    with tarfile.open(folder / "train" / "images.tar", "w") as tar:
        for n in range(12):
            save(folder / "one.png", list(COLOURS)[n % 3])
            tar.add(folder / "one.png", f"{n:02d}.png")
    listed = {f"images.tar/{n:02d}.png": list(COLOURS)[n % 3] for n in range(12)}
    train = {"classes": list(COLOURS), "images": listed}
    images = {f"images/{colour}.png": colour for colour in COLOURS}
    for name, colour in images.items():
        save(folder / "test" / name, colour)
    test = {"classes": sorted(COLOURS), "images": images, "train": "../train/list.json"} | changes
    for name, content in (("train", train), ("test", test)):
        (folder / name / "list.json").write_text(json.dumps(content))
    return folder / "test" / "list.json"


def test_a_linear_probe_takes_two_class_lists(tmp_path):
    """The training list numbers the classes; an image of no class is malformed, not a right answer."""
    data = write_lists(tmp_path)
    result = run_named("linear_probe", Colours(), data, tmp_path / "out", {}, quiet=True)
    assert result["value"] == result["metrics"]["top1"]["value"] == 1.0
    assert result["metrics"]["top1"]["n"] == 3 and result["details"]["training images"] == 12
    wrong = {"images/red.png": "blue", "images/blue.png": "blue", "images/green.png": "pink"}
    (tmp_path / "other").mkdir()
    data = write_lists(tmp_path / "other", images=wrong)
    result = run_named("linear_probe", Colours(), data, tmp_path / "out2", {}, quiet=True)
    assert result["value"] == pytest.approx(1 / 3) and result["malformed"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": None}, 'has no "train", the class list with the training images'),
        ({"train": "nowhere.json"}, "nowhere.json does not exist"),
        ({"classes": ["red", "pink"]}, "has the class 'pink', which ../train/list.json does not have"),
        ({"images": {}}, "lists 0 images, ../train/list.json 12"),
    ],
)
def test_wrong_lists_of_a_linear_probe(tmp_path, changes, message):
    data = write_lists(tmp_path, **changes)
    with pytest.raises(UserError, match=re.escape(message)):
        run_named("linear_probe", Colours(), data, tmp_path / "out", {}, quiet=True)
