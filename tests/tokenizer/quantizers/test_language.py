"""Language codebooks: the golden values and gradients, and that rows follow from words and map alone."""

import json

import pytest
import torch
from safetensors.torch import load_file

from open_unitok.core.errors import UserError
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.quantizers import QUANTIZERS
from open_unitok.tokenizer.quantizers import base as quantizer_base
from open_unitok.tokenizer.quantizers import language as language_module
from open_unitok.tokenizer.quantizers.word_map import WordMap

ADJECTIVES, NOUNS = 14, 18


@pytest.fixture(scope="module")
def vectors(golden):
    tensors = load_file(golden / "quantizers" / "language_codebook.safetensors")
    return tensors, json.loads((golden / "quantizers" / "language_codebook.meta.json").read_text())


def set_map(word_map: WordMap, tensors, prefix: str) -> None:
    for layer, number in ((word_map.first, 1), (word_map.second, 2)):
        layer.weight.data = tensors[f"{prefix}.w{number}"].clone()
        layer.bias.data = tensors[f"{prefix}.b{number}"].clone()


def build(tensors, **options):
    sizes = {"adjectives": ADJECTIVES, "nouns": NOUNS, "word_dim": 24, "hidden": 8, "edges": 82}
    quantizer = QUANTIZERS["language"](3, NOUNS, 16, **{**sizes, "dropout": 0, **options})
    quantizer.map.set_words(tensors["words"], tensors["edges"])
    set_map(quantizer.map, tensors, "gcn")
    return quantizer


def build_map(tensors):
    quantizer = QUANTIZERS["language_map"](1, 32, 8, word_dim=24, hidden=16)
    quantizer.map.set_words(tensors["words"])
    set_map(quantizer.map, tensors, "map")
    return quantizer


def make(**options):
    torch.manual_seed(0)
    sizes = {"adjectives": 5, "nouns": 9, "word_dim": 6, "hidden": 8}
    return QUANTIZERS["language"](3, 9, 8, **{**sizes, **options})


@pytest.mark.parametrize("block", [quantizer_base.SIMILARITY_BLOCK, 50])
def test_golden_values_and_gradients(vectors, block, monkeypatch):
    monkeypatch.setattr(language_module, "SIMILARITY_BLOCK", block)
    tensors, meta = vectors
    quantizer = build(tensors)
    torch.testing.assert_close(quantizer.map().double(), tensors["rows"], rtol=1e-5, atol=1e-6)
    latents = tensors["z"].clone().requires_grad_()
    out = quantizer(latents)
    assert torch.equal(out.codes, tensors["codes"])
    assert torch.equal(quantizer.encode(latents), out.codes)
    torch.testing.assert_close(out.quantised.double(), tensors["quantised"], rtol=1e-5, atol=1e-6)
    assert out.losses["vq"].item() == pytest.approx(meta["loss"], rel=1e-5)
    out.losses["vq"].backward()
    first, second = quantizer.map.first, quantizer.map.second
    found = {"w1": first.weight, "b1": first.bias, "w2": second.weight, "b2": second.bias, "z": latents}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.grad.double(), tensors[f"grad.{name}"], rtol=1e-5, atol=1e-6)


def test_golden_map_variant(vectors):
    tensors = vectors[0]
    quantizer = build_map(tensors)
    assert torch.equal(quantizer.encode(tensors["z"][..., :8])[..., 0], tensors["map.codes"])
    rows = torch.nn.functional.normalize(quantizer.code_table()[0], dim=-1)
    torch.testing.assert_close(rows.double(), tensors["map.rows"], rtol=1e-5, atol=1e-6)
    # UniTok's losses and output are those of a plain quantiser with these rows
    plain = QUANTIZERS["multi_codebook"](1, 32, 8)
    plain.codebooks.data = quantizer.code_table()
    own = quantizer(tensors["z"][..., :8], entropy=True)
    other = plain(tensors["z"][..., :8], entropy=True)
    assert torch.equal(own.codes, other.codes) and torch.equal(own.quantised, other.quantised)
    for name in ("vq", "entropy"):
        torch.testing.assert_close(own.losses[name], other.losses[name])
    (own.losses["vq"] + own.losses["entropy"]).backward()
    assert all(p.grad.any() for p in quantizer.map.parameters())


def test_codes_of_the_two_halves(vectors):
    """By brute force: two adjectives in order, and a noun; codes alone give the output."""
    tensors = vectors[0]
    quantizer = build(tensors)
    z = torch.nn.functional.normalize(tensors["z"].double(), dim=-1)
    rows = tensors["rows"]
    adjectives = torch.cdist(z[..., :8], rows[:ADJECTIVES].expand(2, -1, -1)).topk(2, largest=False).indices
    nouns = torch.cdist(z[..., 8:], rows[ADJECTIVES:].expand(2, -1, -1)).argmin(dim=-1, keepdim=True)
    codes = torch.cat([adjectives, nouns], dim=-1)
    assert torch.equal(quantizer.encode(tensors["z"]), codes)
    # token by token and in any batch: the three indices of a token stay together
    stored = codes.flatten(0, 1)
    whole = quantizer.embed(codes).flatten(0, 1)
    for code, vector in zip(stored, whole):
        a, b, noun = (rows[i].float() for i in (code[0], code[1], ADJECTIVES + code[2]))
        torch.testing.assert_close(vector, torch.cat([(a + b) / 2, noun]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(quantizer(tensors["z"]).quantised, quantizer.embed(codes), rtol=0, atol=1e-6)


def test_equal_rows_take_the_first_entries():
    quantizer = make()
    for parameter in quantizer.map.second.parameters():
        parameter.data.zero_()  # all rows equal
    assert quantizer.encode(torch.randn(1, 4, 8)).unique(dim=1).tolist() == [[[0, 1, 0]]]


def test_embed_is_a_sum_of_rows_of_the_code_table():
    quantizer = make()
    table = quantizer.code_table()
    assert table.shape == (3, 9, 8) and quantizer.code_sizes == [5, 5, 9]
    assert not table[:2, 5:].any()
    codes = quantizer.encode(torch.randn(2, 7, 8))
    assert (codes.amax(dim=(0, 1)) < torch.tensor([5, 5, 9])).all()
    rows = torch.stack([table[k][codes[..., k]] for k in range(3)], dim=-2)
    assert torch.equal(rows.sum(dim=-2), quantizer.embed(codes))


def test_rows_follow_from_words_and_map():
    quantizer = make(edges=4)
    words = torch.randn(14, 6)
    edges = torch.tensor([[0, 5], [0, 9], [3, 13], [4, 6]])
    quantizer.map.set_words(words, edges)
    before = quantizer.map().clone()
    # words in another order: rows in the same other order
    order = torch.randperm(14)
    quantizer.map.set_words(words[order], order.argsort()[edges])
    torch.testing.assert_close(quantizer.map(), before[order], rtol=0, atol=1e-6)
    # a frozen map: no training moves a row
    quantizer.map.set_words(words, edges)
    quantizer.requires_grad_(False)
    quantizer.frozen = True
    out = quantizer.train()(torch.randn(2, 5, 8, requires_grad=True))
    out.losses["vq"].backward()
    assert torch.equal(quantizer.eval().map(), before)


def test_without_edges_the_graph_is_a_plain_network():
    words = torch.randn(14, 6)
    found = make(edges=0)
    found.map.set_words(words)
    hidden = found.map.first(words).relu()
    torch.testing.assert_close(found.map(), found.map.second(hidden), rtol=0, atol=1e-6)


def test_dropout_follows_from_the_step_and_ends_with_training():
    a, b = make(dropout=0.5).train(), make(dropout=0.5).train()
    latents = torch.randn(2, 50, 8)
    first = [a(latents).losses["vq"] for _ in range(3)]
    assert len({loss.item() for loss in first}) == 3  # another mask in every step
    assert torch.equal(torch.stack(first), torch.stack([b(latents).losses["vq"] for _ in range(3)]))
    resumed = make(dropout=0.5).train()
    resumed.load_state_dict(a.state_dict())
    assert torch.equal(resumed(latents).losses["vq"], a(latents).losses["vq"])
    # codes, their embedding and a frozen quantiser never see it
    assert torch.equal(a.encode(latents), a.eval().encode(latents))
    embedded = a.embed(a.encode(latents))
    assert torch.equal(a.train().embed(a.encode(latents)), embedded)
    a.frozen = True
    torch.testing.assert_close(a(latents).quantised, embedded, rtol=0, atol=1e-6)


def test_rows_are_cached_in_evaluation_alone(monkeypatch):
    counted = []
    whole = WordMap._rows
    monkeypatch.setattr(WordMap, "_rows", lambda self, step: counted.append(step) or whole(self, step))
    quantizer = make().eval()
    latents = torch.randn(1, 4, 8)
    with torch.inference_mode():
        codes = quantizer.encode(latents)
    with torch.no_grad():
        quantizer.embed(codes)
        assert len(counted) == 1
        quantizer.map.first.weight.mul_(2)  # an optimiser's step in place
        quantizer.embed(codes)
        assert len(counted) == 2
        quantizer.load_state_dict(make().state_dict())
        quantizer.embed(codes)
        quantizer.double().float().embed(codes)
        assert len(counted) == 4
        quantizer.train().embed(codes)
        quantizer.embed(codes)
        assert len(counted) == 6
    # cached rows serve calls with gradients
    quantizer.requires_grad_(False).eval()
    leaf = torch.randn(1, 4, 8, requires_grad=True)
    quantizer(leaf).losses["vq"].backward()
    assert leaf.grad.any()


@pytest.mark.parametrize("kind", ["language", "language_map"])
def test_words_are_saved_with_the_model_and_in_its_fingerprint(kind, tiny_config, tmp_path):
    torch.manual_seed(0)
    options = {"word_dim": 6, "hidden": 8}
    sizes = {"num_codebooks": 3, "codebook_size": 9, "codebook_dim": 8}
    if kind == "language":
        options |= {"adjectives": 5, "nouns": 9, "edges": 2}
    model = UniTok(tiny_config(quantizer=kind, quantizer_options=options, **sizes)).eval()
    words = torch.randn(14 if kind == "language" else 9, 6)
    model.quantizer.map.set_words(words, torch.tensor([[0, 5], [1, 6]]) if kind == "language" else None)
    model.save_pretrained(tmp_path)
    loaded = UniTok.from_pretrained(tmp_path)
    assert torch.equal(loaded.quantizer.map.vectors, words) and loaded.quantizer.map.is_set
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    codes = model.encode(pixels)
    assert torch.equal(loaded.encode(pixels), codes)
    assert torch.equal(loaded.decode(codes), model.decode(codes))
    assert model.config.bits_per_token == pytest.approx(model.quantizer.bits_per_token)
    before = model.fingerprint()
    assert loaded.fingerprint() == before
    prints = {before}
    for tensor in (model.quantizer.map.vectors, model.quantizer.map.second.bias):
        tensor.data[0] += 1
        prints.add(model.fingerprint())
    if kind == "language":
        model.quantizer.map.edges[0, 1] = 7
        prints.add(model.fingerprint())
    assert len(prints) == 3 + (kind == "language")
    half = model.bfloat16()
    assert half.quantizer.map.vectors.dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "sizes", "options", "words"),
    [
        ("language", (2, 9, 8), {}, "num_codebooks is 2, but quantizer 'language' has 3 codes per token"),
        ("language", (3, 9, 7), {}, "codebook_dim is 7: quantizer 'language' cuts it into two halves"),
        ("language", (3, 9, 8), {"adjectives": 1}, "needs two adjectives"),
        ("language", (3, 9, 8), {"map": "cnn"}, "map is 'cnn': it must be gcn or mlp"),
        ("language", (3, 9, 8), {"hidden": 0}, "hidden is 0: it must be 1 or more"),
        ("language", (3, 9, 8), {"dropout": 1.0}, "dropout is 1.0: it must be from 0 to below 1"),
        ("language_map", (1, 9, 8), {"edges": 3}, "edges is for map: gcn"),
        ("language", (3, 9, 8), {"gradient": "none"}, "gradient is 'none'"),
    ],
)
def test_wrong_options_are_named(kind, sizes, options, words):
    with pytest.raises(UserError, match=words):
        QUANTIZERS[kind](*sizes, **options)


def test_wrong_words_are_rejected():
    quantizer = make(edges=2)
    with pytest.raises(UserError, match=r"vectors have shape \(3, 6\), but .* \(14, 6\)"):
        quantizer.map.set_words(torch.zeros(3, 6))
    with pytest.raises(UserError, match=r"edges have shape \(0, 2\), but .* \(2, 2\)"):
        quantizer.map.set_words(torch.zeros(14, 6))
    with pytest.raises(UserError, match="hold NaN"):
        quantizer.map.set_words(torch.full((14, 6), torch.nan), torch.zeros(2, 2))
    with pytest.raises(UserError, match="no entropy loss"):
        quantizer(torch.zeros(1, 2, 8), entropy=True)
