"""Retrieval: known scores from known embeddings, through the command line."""

import json

import numpy as np
import pytest
from PIL import Image

from open_unitok.cli.main import main
from open_unitok.eval.tokenizer.retrieval import retrieval_hits


class Scripted:
    """The embedding of an image is its corner's red level as a one-hot row, that of a caption its number."""

    device = "cpu"

    def __init__(self, folder, *options):
        pass

    def check_needs(self, needs, benchmark):
        pass

    def describe(self):
        return {"path": "scripted", "kind": "tokenizer", "fingerprint": "0"}

    def embed_images(self, images):
        return np.eye(256, dtype=np.float32)[[np.asarray(image)[0, 0, 0] for image in images]]

    def embed_texts(self, texts):
        return np.eye(256, dtype=np.float32)[[int(text) for text in texts]]


@pytest.fixture
def images(tmp_path):
    """230 images: in the first hundred, two have each other's caption and one is unreadable."""
    rows = []
    for i in range(230):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / f"{i}.png")
        rows.append({"file": f"{i}.png", "captions": [str({3: 4, 4: 3}.get(i, i)), "unread"]})
    (tmp_path / "9.png").write_bytes(b"no image")
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    return tmp_path


def test_recall_through_the_command_line(images, monkeypatch, capsys):
    monkeypatch.setattr("open_unitok.eval.core.model.Model", Scripted)
    out = images / "out"
    main(["eval", "run", "retrieval", "--model", "m", "--data", str(images), "--out", str(out)])
    result = json.loads((out / "retrieval" / "results.json").read_text())
    # the last 30 have the last hundred as candidates
    assert result["metrics"]["image_to_text/R@1"]["value"] == pytest.approx(227 / 230)
    assert result["metrics"]["text_to_image/R@1"]["value"] == pytest.approx(227 / 230)
    assert result["n"] == 230 and result["failed"] == 1 and result["metadata"]["pool"] == 100
    assert result["not_comparable_reason"] == "1 samples could not be asked"
    low, high = result["metrics"]["image_to_text/R@1"]["interval"]
    assert 0.95 < low < 227 / 230 < high <= 1
    assert "9.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("pool", "size", "right"), [(0, 230, 227), (7, 7, 227), (1000, 230, 227), (4, 4, 228)]
)
def test_any_pool_size_keeps_every_image(images, monkeypatch, capsys, pool, size, right):
    monkeypatch.setattr("open_unitok.eval.core.model.Model", Scripted)
    out = images / "out"
    words = ["eval", "run", "retrieval", "--model", "m", "--data", str(images), "--out", str(out)]
    main([*words, "--pool", str(pool)])
    result = json.loads((out / "retrieval" / "results.json").read_text())
    assert result["n"] == result["metrics"]["text_to_image/R@1"]["n"] == 230
    assert result["metadata"]["pool"] == size and result["details"]["chance"] == 1 / size
    # images 3 and 4 have each other's caption; in a pool of four without it, image 4 wins a tie of zeros
    assert result["metrics"]["image_to_text/R@1"]["value"] == pytest.approx(right / 230)
    # recall at 5 of four candidates says nothing
    assert ("text_to_image/R@5" in result["metrics"]) == (size > 5)


def test_equal_captions_are_equally_correct_and_k_may_exceed_the_pool():
    queries, candidates = np.eye(3), np.eye(3)[[1, 0, 2]]
    assert retrieval_hits(queries, candidates, ["a", "b", "c"], 1).tolist() == [0, 0, 1]
    assert retrieval_hits(queries, candidates, ["a", "a", "c"], 1).tolist() == [1, 1, 1]
    assert retrieval_hits(queries, candidates, ["a", "b", "c"], 5).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"file": "a.png"}], "captions"),
        ([{"file": "a.png", "captions": []}], "non-empty list of texts"),
        ([], "is empty"),
        ({"file": 1}, "captions.json"),
    ],
)
def test_malformed_captions_are_named(tmp_path, capsys, monkeypatch, rows, words):
    monkeypatch.setattr("open_unitok.eval.core.model.Model", Scripted)
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "eval",
                "run",
                "retrieval",
                "--model",
                "m",
                "--data",
                str(tmp_path),
                "--out",
                str(tmp_path / "o"),
            ]
        )
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1
