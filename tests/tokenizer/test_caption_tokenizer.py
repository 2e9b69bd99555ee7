"""Captions to token ids: CLIP's vocabulary against golden ids, and sentencepiece."""

import json

import pytest
import sentencepiece

from open_unitok.core.errors import UserError
from open_unitok.core.files import model_path
from open_unitok.tokenizer.caption_tokenizer import CaptionTokenizer


@pytest.fixture(scope="module")
def clip_tokens(golden):
    return json.loads((golden / "preprocess" / "preprocess.meta.json").read_text())["clip_tokens"]


def test_clip(golden, clip_tokens, tmp_path):
    """The reduced merges file holds only the merges of these captions, at their original ranks."""
    for length, captions in clip_tokens.items():
        tokenizer = CaptionTokenizer.from_path(golden / "preprocess" / "merges_reduced.txt.gz", int(length))
        assert tokenizer(list(captions)).tolist() == list(captions.values())
        assert tokenizer.vocab_size == 49408
        tokenizer.save(tmp_path)
        loaded = CaptionTokenizer.from_model_folder(tmp_path, int(length))
        assert loaded(list(captions)).tolist() == list(captions.values())


def test_clip_cleans_captions_as_published(golden):
    """Golden ids of captions with mojibake, curly quotes, ligatures, full-width letters, special tokens."""
    captions = json.loads((golden / "preprocess" / "clip_captions.json").read_text())
    tokenizer = CaptionTokenizer.from_path(golden / "preprocess" / "merges_reduced.txt.gz", 77)
    for caption, ids in captions.items():
        assert tokenizer([caption])[0, : len(ids) + 1].tolist() == [*ids, 0], repr(caption)


def test_a_model_names_its_caption_tokenizer():
    inside = model_path("scenes") / "unitok" / "caption_tokenizer"
    expected = CaptionTokenizer.from_path(inside / "tokenizer.model", 24)
    for name in ("scenes", model_path("scenes"), model_path("scenes") / "unitok", inside):
        tokenizer = CaptionTokenizer.from_path(name, 24)
        assert tokenizer.fingerprint == expected.fingerprint
        assert tokenizer(["a red circle"]).tolist() == expected(["a red circle"]).tolist()


def test_sentencepiece(tmp_path):
    sentences = iter(["a red circle above a blue square", "three small green triangles"] * 20)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=40,
        model_type="bpe",
        minloglevel=2,
    )
    tokenizer = CaptionTokenizer.from_path(tmp_path / "tokenizer.model", context_length=6)
    assert (tokenizer.start, tokenizer.end, tokenizer.vocab_size) == (40, 41, 42)
    ids = tokenizer(["a red circle above a blue square", ""])
    assert ids.shape == (2, 6)
    assert ids[0, 0] == 40 and ids[0, 5] == 41 and ids[0].argmax() == 5
    assert ids[1].tolist() == [40, 41, 0, 0, 0, 0]
    with pytest.raises(UserError, match="half of a surrogate pair"):
        tokenizer(["\ud83d"])
    tokenizer.save(tmp_path / "model")
    loaded = CaptionTokenizer.from_model_folder(tmp_path / "model", 6)
    assert loaded(["three green squares"]).tolist() == tokenizer(["three green squares"]).tolist()


def test_errors(tmp_path):
    with pytest.raises(UserError, match="holds no caption tokenizer"):
        CaptionTokenizer.from_path(tmp_path)
    with pytest.raises(UserError, match="saved without its caption tokenizer"):
        CaptionTokenizer.from_model_folder(tmp_path)
    with pytest.raises(UserError, match="sceens, which does not exist"):
        CaptionTokenizer.from_path("sceens")
    (tmp_path / "merges.txt").write_text("#version\na b\nnot a merge\n")
    with pytest.raises(UserError, match=r"merges\.txt, line 3, is not a merge"):
        CaptionTokenizer.from_path(tmp_path / "merges.txt")
    (tmp_path / "merges.txt.gz").write_bytes(b"\x1f\x8b\x08broken")
    with pytest.raises(UserError, match=r"merges\.txt\.gz cannot be read"):
        CaptionTokenizer.from_path(tmp_path / "merges.txt.gz")
    (tmp_path / "tokenizer.model").write_text("not a sentencepiece model")
    with pytest.raises(UserError, match="is not a sentencepiece model"):
        CaptionTokenizer.from_path(tmp_path)
