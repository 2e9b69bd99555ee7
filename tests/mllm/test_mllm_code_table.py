"""The frozen code table that the MLLM copies from the tokenizer's quantiser."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from open_unitok.core.errors import UserError
from open_unitok.generation.loading import check_parts_match
from open_unitok.mllm import UniTokForConditionalGeneration, UniTokMLLMConfig, VisualEmbedder
from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.tokenizer.projection import ProjectionAttention

SIZES = {
    "stem_width": 8,
    "stage_widths": (8, 16),
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "decoder_widths": (16, 8),
    "text_hidden_size": 16,
    "text_num_layers": 1,
    "text_num_heads": 2,
    "num_codebooks": 3,
    "codebook_size": 8,
    "codebook_dim": 4,
    "hidden_size": 24,
    "image_size": 32,
    "text_vocab_size": 64,
}


def make_unitok(**changes) -> UniTok:
    torch.manual_seed(0)
    unitok = UniTok(UniTokConfig(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        unitok.quantizer.codebooks.normal_()
    return unitok


@pytest.mark.parametrize(("quantizer", "row_norm"), [("multi_codebook", "unit"), ("nearest", "none")])
def test_the_model_embeds_codes_as_the_quantiser(tiny, quantizer, row_norm):
    unitok = make_unitok(quantizer=quantizer)
    assert UniTokMLLMConfig.for_tokenizer(unitok.config).row_norm == row_norm
    model = tiny(row_norm=row_norm)
    model.init_from_tokenizer(unitok)
    codes = torch.randint(0, 8, (2, 4, 3))
    assert torch.equal(model.visual_embedder.embed(codes), unitok.quantizer.embed(codes))
    # rows are stored as in the tokenizer
    assert torch.equal(model.visual_embedder.codebooks, unitok.quantizer.code_table())


def test_blocks_of_rows_have_unit_norm(tiny):
    embedder = tiny(row_norm="blocks", row_blocks=2).visual_embedder
    embedded = embedder.embed(torch.randint(0, 8, (2, 4, 3)))
    torch.testing.assert_close(embedded.unflatten(-1, (6, 2)).norm(dim=-1), torch.ones(2, 4, 6))


def test_quantisers_with_another_norm_are_rejected(tiny):
    with pytest.raises(UserError, match="row_norm = 'unit' in the model, but 'none' in the"):
        tiny().init_from_tokenizer(make_unitok(quantizer="nearest"))


def test_quantisers_without_code_table_are_rejected(tiny, monkeypatch):
    unitok = make_unitok()
    monkeypatch.setattr(unitok.quantizer, "code_table", lambda: None)
    with pytest.raises(UserError, match=r"quantizer = 'multi_codebook' does not have .Quantizer.code_table"):
        tiny().init_from_tokenizer(unitok)
    monkeypatch.setattr(type(unitok.quantizer), "reads", False)
    with pytest.raises(UserError, match="cannot be read by an MLLM"):
        tiny().init_from_tokenizer(unitok)


@pytest.mark.parametrize(("flag", "verb"), [("reads", "read"), ("generates", "generated")])
def test_an_mllm_needs_codes_that_it_reads_and_generates(tiny, monkeypatch, flag, verb):
    unitok, model = make_unitok(), tiny()
    monkeypatch.setattr(type(unitok.quantizer), flag, False)
    words = rf"'multi_codebook' cannot be {verb} by an MLLM \(Quantizer\.{flag}\)"
    with pytest.raises(UserError, match=words):
        UniTokMLLMConfig.for_tokenizer(unitok.config)
    with pytest.raises(UserError, match=words):
        model.init_from_tokenizer(unitok)
    with pytest.raises(UserError, match=words):
        check_parts_match(model, unitok, SimpleNamespace(vocab_size=1), Path("folder"))


def test_init_weights_of_the_embedder(tiny_config):
    embedder = VisualEmbedder(tiny_config(), 32)
    torch.manual_seed(0)
    embedder.init_weights()
    torch.manual_seed(0)
    assert torch.equal(embedder.codebooks, torch.randn(3, 8, 4))
    assert not embedder.codebooks.requires_grad


def test_the_model_initialises_parts_by_their_own_init_weights(tiny_config, monkeypatch):
    calls = []
    for part in (VisualEmbedder, ProjectionAttention):
        monkeypatch.setattr(part, "init_weights", lambda self: calls.append(type(self)))
    UniTokForConditionalGeneration(tiny_config())
    assert calls == [ProjectionAttention, VisualEmbedder]


def test_unknown_norms_are_named(tiny_config):
    with pytest.raises(UserError, match=r"row_norm = 'units'\. Did you mean 'unit'"):
        tiny_config(row_norm="units")
    with pytest.raises(UserError, match="row_blocks = 3 does not divide codebook_dim = 4"):
        tiny_config(row_norm="blocks", row_blocks=3)
