"""Columns that a row of the study does not have."""

import json

import pytest

from open_unitok.study import measure
from open_unitok.tokenizer import UniTok, UniTokConfig

SMALL = {
    "image_size": 32, "stem_width": 8, "stage_widths": (8, 8), "stage_depths": (1, 1), "hidden_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "decoder_widths": (8, 8), "decoder_depths": (1, 1),
    "num_codebooks": 2, "codebook_size": 16, "codebook_dim": 4, "embed_dim": 16, "text_hidden_size": 16,
    "text_num_layers": 1, "text_num_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize(("loss", "learns"), [("l1", True), ("l2", True), ("lpips", True), ("vq", False)])
def test_a_row_without_a_loss_on_pixels_is_known(tmp_path, loss, learns):
    losses = {"l1": 0.0, "l2": 0.0, "lpips": 0.0, "vq": 0.0, loss: 0.5}
    (tmp_path / "config.yaml").write_text(json.dumps({"losses": losses}))
    assert measure.learns_pixels(tmp_path) == learns


def test_parameters_leave_out_the_text_tower():
    few, many = (UniTok(UniTokConfig(**SMALL, text_vocab_size=size)) for size in (100, 5000))
    assert measure.count_parameters(few) == measure.count_parameters(many) > 0
    assert sum(p.numel() for p in many.parameters()) > measure.count_parameters(many)


@pytest.mark.parametrize(("quantizer", "bits"), [("multi_codebook", 4 * 8), ("none", None)])
def test_a_continuous_tokenizer_has_no_bits(tmp_path, monkeypatch, quantizer, bits):
    monkeypatch.setattr(measure, "TIMED_BATCH", 1)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "samples_per_second": 2.0}\n')
    (tmp_path / "config.yaml").write_text('{"batch_size": 4}')
    model = UniTok(UniTokConfig(**SMALL, quantizer=quantizer)).eval()
    columns = measure.model_columns(model, tmp_path)
    assert columns["bits"] == bits and columns["step_seconds"] == 2
