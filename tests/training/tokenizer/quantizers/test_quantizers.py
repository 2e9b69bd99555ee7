"""`unitok train` with another quantiser, codebook initialisation and dead-code resets included."""

import json

import pytest
import torch

from open_unitok.cli.main import main
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.quantizers import NearestQuantizer


def test_another_quantizer_trains_end_to_end(data, tmp_path, capsys):
    def train(*changes: str) -> None:
        changes = (f"out={tmp_path / 'run'}", "steps=4", "model.quantizer=nearest", *changes)
        main(["train", str(data / "config.yaml"), *changes])

    with pytest.raises(SystemExit):
        train()
    assert "'nearest' has no entropy loss: set losses.entropy to 0" in capsys.readouterr().err
    train("losses.entropy=0", "model.quantizer_options={commitment: 0.5}", f"out={tmp_path / 'other'}")
    model = UniTok.from_pretrained(tmp_path / "other" / "model")
    assert isinstance(model.quantizer, NearestQuantizer) and model.quantizer.commitment == 0.5
    assert model.quantizer.usage.sum(dim=-1).tolist() == pytest.approx([1, 1])
    # Initialised on latents without normalisation: with UniTok's unit rows all norms would be near 1.
    norms = model.quantizer.codebooks.norm(dim=-1)
    assert norms.std() > 0.05
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    assert model.decode(model.encode(pixels)).shape == pixels.shape


def test_an_oblong_layout_trains_end_to_end(data, tmp_path):
    layout = "model.token_layout={rows: 1, columns: 2}"
    main(["train", str(data / "config.yaml"), f"out={tmp_path / 'run'}", "steps=2", layout])
    model = UniTok.from_pretrained(tmp_path / "run" / "model")
    assert model.config.layout.grid == (1, 2)
    pixels = torch.rand(2, 3, 16, 32) * 2 - 1
    assert model.decode(model.encode(pixels)).shape == pixels.shape


def test_disentangle_trains_where_the_config_asks_for_it(data, tmp_path, capsys):
    def train(*changes: str) -> None:
        main(["train", str(data / "config.yaml"), f"out={tmp_path / 'run'}", "steps=1", *changes])

    train("losses.disentangle=0.1", "model.quantizer_options={entropy_eps: 1e-5, unit_rows: true}")
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    parts = 0.2 * row["l1"] + row["l2"] + row["vq"] + 0.1 * row["entropy"] + row["clip"]
    assert row["loss"] == pytest.approx(parts + 0.1 * row["disentangle"], rel=1e-5)
    assert 0 < row["disentangle"] < 1
    for changes, words in (
        (["losses.disentangle=0.1", "model.num_codebooks=1"], "num_codebooks is 1"),
        (["losses.disentangle=0.1", "losses.entropy=0", "model.quantizer=nearest"], "has no such loss"),
        (["losses.entropy=0", "model.quantizer=ema"], "codebooks.reset_after is 2"),
    ):
        with pytest.raises(SystemExit) as left:
            train(*changes, f"out={tmp_path / 'wrong'}")
        assert left.value.code == 2 and words in capsys.readouterr().err
        assert not (tmp_path / "wrong" / "metrics.jsonl").exists()


def test_a_published_quantizer_starts_a_run_and_stays_frozen(data, tmp_path, capsys):
    rows = torch.nn.functional.normalize(torch.randn(16, 8), dim=-1)
    torch.save({"_quantizer._embedding.weight": rows}, tmp_path / "vqkd.pth")
    main(["convert", "quantizer", "vqkd", str(tmp_path / "vqkd.pth"), str(tmp_path / "rows")])

    def train(name: str, *changes: str) -> None:
        sizes = ["model.num_codebooks=1", "model.codebook_dim=8", "model.quantizer=ema", "losses.entropy=0"]
        given = [*sizes, "codebooks={}", "steps=2", f"init_quantizer={tmp_path / 'rows'}", *changes]
        main(["train", str(data / "config.yaml"), f"out={tmp_path / name}", *given])

    train("frozen", "freeze=[quantizer]")
    quantizer = UniTok.from_pretrained(tmp_path / "frozen" / "model").quantizer
    assert torch.equal(quantizer.codebooks[0], rows) and quantizer.started
    train("moving")
    assert not torch.equal(UniTok.from_pretrained(tmp_path / "moving" / "model").quantizer.codebooks[0], rows)
    for changes, words in (
        (["codebooks={init_images: 16}"], "init_quantizer and codebooks.init both initialise"),
        (["model.codebook_size=8"], "codebook_size = 16, but model.codebook_size is 8"),
        (["freeze=[encoder]"], "without init_from: frozen random weights are never trained"),
    ):
        with pytest.raises(SystemExit):
            train("other", *changes)
        assert words in capsys.readouterr().err and not (tmp_path / "other").exists()
