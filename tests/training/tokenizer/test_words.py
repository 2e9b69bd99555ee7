"""The section `words` of a tokenizer's run."""

import numpy as np
import pytest
import torch

from open_unitok.cli.main import main
from open_unitok.tokenizer import UniTok

FIELDS = ["steps=1", "codebooks={}", "losses.entropy=0", "model.codebook_dim=8"]


@pytest.fixture
def words(tmp_path):
    (tmp_path / "adjectives.txt").write_text("red\nblue\ngreen\n")
    (tmp_path / "nouns.txt").write_text("cat\ntree\nhouse\nboat\n")
    (tmp_path / "edges.txt").write_text("red\tcat\ngreen\ttree\n")
    np.save(tmp_path / "words.npy", np.random.default_rng(0).normal(size=(7, 6)))
    return tmp_path


def train(data, out, words, kind, *changes):
    lists = [str(words / "adjectives.txt"), str(words / "nouns.txt")]
    section = f"words={{lists: {lists}, vectors: {words / 'words.npy'}, edges: {words / 'edges.txt'}}}"
    main(["train", str(data / "config.yaml"), f"out={out}", *FIELDS, f"model.quantizer={kind}",
          "model.quantizer_options={map: gcn, hidden: 8}", section, *changes])  # fmt: skip
    return UniTok.from_pretrained(out / "model")


@pytest.mark.parametrize("kind", ["language", "language_map"])
def test_a_run_takes_sizes_and_vectors_from_its_words(data, words, tmp_path, kind):
    # sizes that are left out follow from the words
    fields = ["model.num_codebooks=3", f"model.codebook_size={4 if kind == 'language' else 7}"]
    model = train(data, tmp_path / "run", words, kind, *fields)
    expected = torch.from_numpy(np.load(words / "words.npy")).float()
    assert torch.equal(model.quantizer.map.vectors, expected) and model.quantizer.map.is_set
    assert model.quantizer.map.edges.tolist() == [[0, 3], [2, 4]]
    assert model.quantizer.code_sizes == ([3, 3, 4] if kind == "language" else [7, 7, 7])


def test_a_pyramid_takes_the_words_of_its_inner_quantiser(data, words, tmp_path):
    pyramid = "{scales: [1, 2], inner: language_map, inner_options: {map: gcn, hidden: 8}}"
    fields = ["model.num_codebooks=1", "model.codebook_size=7", f"model.quantizer_options={pyramid}"]
    model = train(data, tmp_path / "run", words, "residual", *fields)
    expected = torch.from_numpy(np.load(words / "words.npy")).float()
    assert torch.equal(model.quantizer.inner.map.vectors, expected) and model.quantizer.inner.map.is_set


def test_complex_vectors_are_rejected(data, words, tmp_path, capsys):
    path = tmp_path / "complex.npy"
    np.save(path, np.load(words / "words.npy") * (1 + 1j))
    with pytest.raises(SystemExit):
        train(data, tmp_path / "run", words, "language", f"words.vectors={path}")
    assert "vectors have dtype torch.complex" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("language", "words.lists=[]", "words needs both lists"),
        ("nearest", "model.quantizer_options={}", "model.quantizer is 'nearest', but only language and"),
        ("language", "model.quantizer_options={adjectives: 9}", "adjectives is 9, but the words have 3"),
        ("language", "model.codebook_size=9", "model.codebook_size is 9, but the words have 4"),
        ("language", "model.num_codebooks=2", "model.num_codebooks is 2, but the words have 3"),
    ],
)
def test_wrong_words_are_one_line(data, words, tmp_path, capsys, kind, change, message):
    with pytest.raises(SystemExit):
        train(data, tmp_path / "run", words, kind, "model.num_codebooks=3", "model.codebook_size=4", change)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and not (tmp_path / "run" / "metrics.jsonl").exists()
