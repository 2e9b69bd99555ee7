"""Emoji: nearest originals of generated and reconstructed images, and answers, with scripted models."""

import json

import numpy as np
import pytest
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.eval.core.model import Reconstructions
from open_unitok.eval.judges.nearest_originals import NearestOriginals

from ..conftest import run_named

STYLES, NAMES = ("Google", "Twitter"), ("RED HEART", "HOUSE", "TREE", "TWIN A", "TWIN B")
SPLITS = {"train": NAMES[:3], "pairs": NAMES[3:]}


def pixels(name, style):
    """The twins look the same in either style."""
    seed = 3 if name.startswith("TWIN") else NAMES.index(name)
    return np.random.default_rng([seed, STYLES.index(style)]).integers(0, 256, (8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("emoji")
    for split, names in SPLITS.items():
        items = []
        for name in names:
            for style in STYLES:
                file = f"images/{style}-{name}.png".lower().replace(" ", "-")
                (root / split / "images").mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels(name, style)).save(root / split / file)
                questions = [
                    {"kind": "name", "question": "What is this?", "answer": name},
                    {"kind": "style", "question": "Which style is it?", "answer": style},
                ]
                labels = {"name": name, "style": style, "category": "Objects", "questions": questions}
                items.append({"file": file, "prompt": f"{name}, {style} style", **labels})
        (root / split / "items.json").write_text(json.dumps(items))
    return root


class Painter:
    """Generates by `choose(name, style)`; reconstructions and answers are right but for `wrong` ones."""

    def __init__(self, choose=lambda name, style: (name, style), wrong=()):
        self.choose, self.wrong = choose, wrong

    def describe(self):
        return {"path": "painter", "kind": "mllm", "fingerprint": "0"}

    def generate(self, prompts, seeds):
        made = []
        for prompt in prompts:
            name, _, style = prompt.removesuffix(" style").partition(", ")
            noise = np.random.default_rng(0).integers(-20, 21, (8, 8, 3))
            image = pixels(*self.choose(name, style)).astype(int) + noise
            made.append(Image.fromarray(image.clip(0, 255).astype(np.uint8)))
        return made

    def reconstruct(self, images, reencode=False):
        decoded = np.stack([np.asarray(image) for image in images])
        return Reconstructions(decoded, decoded, np.zeros((len(images), 1, 1), int), 8)

    def answer(self, images, questions, max_new_tokens):
        known = {pixels(name, style).tobytes(): (name, style) for name in NAMES for style in STYLES}
        answers = []
        for image, question in zip(images, questions):
            name, style = known[np.asarray(image).tobytes()]
            answers.append(name.lower() + "." if question == "What is this?" else style)
            if question in self.wrong:
                answers[-1] += " or not"
        return answers


def values(result):
    return {name: round(metric["value"], 6) for name, metric in result["metrics"].items()}


@pytest.mark.parametrize(
    ("choose", "emoji", "in_style"),
    [
        (lambda name, style: (name, style), 1.0, 1.0),
        (lambda name, style: (name, "Google"), 1.0, 0.5),
        (lambda name, style: ("HOUSE", style), round(1 / 3, 6), round(1 / 3, 6)),
    ],
)
def test_generated_images_are_found_among_all_originals(data, tmp_path, choose, emoji, in_style):
    result = run_named("emoji", Painter(choose), data / "train", tmp_path, quiet=True)
    assert values(result) == {
        "emoji": emoji,
        "emoji in its style": in_style,
        "ceiling": 1.0,
        "ceiling in its style": 1.0,
    }
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    wrong = [row["reason"] for row in rows if row["reason"]]
    assert len(wrong) == round(6 * (1 - in_style)) and all("nearest: " in reason for reason in wrong)


def test_equal_images_are_equally_right(data, tmp_path):
    swapped = Painter(lambda name, style: ({"TWIN A": "TWIN B", "TWIN B": "TWIN A"}[name], style))
    result = run_named("emoji", swapped, data / "pairs", tmp_path, quiet=True)
    assert values(result)["emoji"] == 1.0 == values(result)["emoji in its style"]


def test_reconstructions_of_a_tokenizer(data, tmp_path):
    result = run_named("emoji_reconstruction", Painter(), data / "train", tmp_path, quiet=True)
    assert values(result) == {"emoji": 1.0, "emoji in its style": 1.0}


def test_answers_are_compared_word_by_word(data, tmp_path):
    result = run_named("emoji_questions", Painter(), data / "train", tmp_path / "a", quiet=True)
    assert values(result) == {"accuracy": 1.0, "kind/name": 1.0, "kind/style": 1.0}
    model = Painter(wrong=("What is this?",))
    result = run_named("emoji_questions", model, data / "train", tmp_path / "b", quiet=True)
    assert values(result) == {"accuracy": 0.5, "kind/name": 0.0, "kind/style": 1.0}


def test_malformed_items_count_as_wrong_and_many_are_rejected(data, tmp_path):
    items = json.loads((data / "train" / "items.json").read_text())
    for split in SPLITS:
        (tmp_path / split).mkdir()
        (tmp_path / split / "images").symlink_to(data / split / "images")
        (tmp_path / split / "items.json").write_text((data / split / "items.json").read_text())
    del items[0]["name"]
    items[1]["questions"] = [{"kind": "name"}]
    path = tmp_path / "train" / "items.json"
    path.write_text(json.dumps(items))
    result = run_named("emoji", Painter(), path.parent, tmp_path / "a", quiet=True)
    assert values(result)["emoji"] == round(5 / 6, 6)
    result = run_named("emoji_reconstruction", Painter(), path.parent, tmp_path / "r", quiet=True)
    assert values(result) == {"emoji": round(5 / 6, 6), "emoji in its style": round(5 / 6, 6)}
    result = run_named("emoji_questions", Painter(), path.parent, tmp_path / "b", quiet=True)
    assert result["metrics"]["accuracy"]["n"] == 10 and values(result)["accuracy"] == 0.8
    path.write_text(json.dumps([{"file": "x"}] * 5 + items[2:3]))
    for name in ("emoji", "emoji_reconstruction", "emoji_questions"):
        with pytest.raises(UserError, match="malformed"):
            run_named(name, Painter(), path.parent, tmp_path / "c", quiet=True)
    with pytest.raises(UserError, match=r"items\.json.*unitok data emoji"):
        run_named("emoji", Painter(), tmp_path, tmp_path / "d", quiet=True)
    path.write_text((data / "train" / "items.json").read_text())
    path.parent.rename(tmp_path / "alone")
    with pytest.raises(UserError, match="compared with the originals of all splits"):
        run_named("emoji", Painter(), tmp_path / "pairs", tmp_path / "e", quiet=True)


def test_images_of_another_size_have_no_nearest_original():
    finder = NearestOriginals(np.zeros((3, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match=r"\(4, 4, 3\); the originals are \(8, 8, 3\)"):
        finder.nearest(np.zeros((4, 4, 3), np.uint8))


def test_nearest_is_exact_where_float32_is_not():
    rng = np.random.default_rng(0)
    originals = rng.integers(0, 256, (50, 64, 64, 3), np.uint8)
    originals[7] = originals[30]
    originals[7, 0, 0, 0] ^= 1  # one level of one channel, below the resolution of float32 sums
    finder = NearestOriginals(originals)
    assert [finder.nearest(image) for image in originals] == list(range(50))
