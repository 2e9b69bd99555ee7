"""How codebooks start and when they stand still: k-means, resume, freezing, rows that move by themselves."""

import json

import pytest
import torch
from safetensors.torch import load_file

from open_unitok.cli.main import main
from open_unitok.core.errors import UserError
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.quantizers import QUANTIZERS
from open_unitok.tokenizer.quantizers.ema import EMAQuantizer
from open_unitok.training.tokenizer.dead_codes import start_kmeans

EMA = ["model.quantizer=ema", "losses.entropy=0", "codebooks={init: kmeans, init_images: 8}", "steps=4"]


def train(data, out, *overrides):
    main(["train", str(data / "config.yaml"), f"out={out}", *overrides])
    return load_file(out / "model" / "model.safetensors")


def rows(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run of a moving-average codebook that k-means has started."""
    out = tmp_path_factory.mktemp("kmeans") / "run"
    return out, train(data, out, *EMA)


def test_resume_does_not_repeat_kmeans(data, whole, tmp_path, monkeypatch):
    out, weights = whole
    assert weights["quantizer.started"].item()
    train_rows = UniTok.from_pretrained(out / "model").quantizer.codebooks
    assert not train_rows.requires_grad  # also when it is loaded
    main(["train", str(data / "config.yaml"), f"out={tmp_path / 'run'}", *EMA, "stop_at=2"])
    monkeypatch.setattr(EMAQuantizer, "start_kmeans", lambda *_: pytest.fail("k-means ran again"))
    resumed = train(data, tmp_path / "run", *EMA)
    assert rows(tmp_path / "run") == rows(out)
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
    # neither does a new run from the model
    train(data, tmp_path / "next", *EMA, f"init_from={out / 'model'}", "steps=1")


def test_a_frozen_quantizer_stands_still(data, whole, tmp_path):
    """The pixel decoder's phase: moving averages stop, and the encoder stays."""
    out, before = whole
    frozen = ["freeze=[encoder, down_projection, quantizer]", "losses.vq=0", "losses.clip=0", "steps=2"]
    settings = ["model.quantizer=ema", "losses.entropy=0", "codebooks={}", f"init_from={out / 'model'}"]
    after = train(data, tmp_path / "run", *settings, *frozen)
    for name in ("quantizer.codebooks", "quantizer.started"):
        assert torch.equal(after[name], before[name])
    moved = train(data, tmp_path / "other", *settings, "steps=2")
    assert not torch.equal(moved["quantizer.codebooks"], before["quantizer.codebooks"])


def test_kmeans_indices_depend_on_seed_and_book():
    torch.manual_seed(0)
    latents = torch.randn(40, 8)

    def start(seed, kind="ema"):
        torch.manual_seed(1)
        quantizer = QUANTIZERS[kind](2, 16, 4)
        start_kmeans(quantizer, latents, seed)
        return quantizer

    assert torch.equal(start(0).codebooks, start(0).codebooks) and start(0).started
    assert not torch.equal(start(0).codebooks, start(1).codebooks)
    # other kinds with unit rows start as well; the same latents, the same rows
    torch.testing.assert_close(start(0, "multi_codebook").codebooks, start(0).codebooks)
    with pytest.raises(UserError, match="10 latents, fewer than 16 entries"):
        start_kmeans(QUANTIZERS["ema"](2, 16, 4), latents[:10], 0)
    with pytest.raises(UserError, match="by cosine"):
        start_kmeans(QUANTIZERS["nearest"](2, 16, 4), latents, 0)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["codebooks={init: kmeans, init_images: 2}"], "8 latents, fewer than 16 entries"),
        (["codebooks={init: random, init_images: 2}"], "codebooks.init_images is 2: set it to 0"),
        (["codebooks={init: kmean}"], "Did you mean 'kmeans'"),
        (["codebooks={reset_after: 2}"], "rows of EMAQuantizer move in the forward pass"),
        (["model.quantizer=cluster", "codebooks={}", "engine.zero_stage=1"], "engine.zero_stage is 1"),
        (["codebooks={init: kmeans}", "freeze=[quantizer]", "init_from=HERE"], "would change its entries"),
    ],
)
def test_wrong_starts_stop_before_the_first_batch(data, tmp_path, capsys, overrides, words):
    with pytest.raises(SystemExit) as left:
        main(
            [
                "train",
                str(data / "config.yaml"),
                f"out={tmp_path / 'run'}",
                *EMA,
                *(text.replace("HERE", str(data)) for text in overrides),
            ]
        )
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert left.value.code == 2 and last.startswith("unitok: error:") and words in last
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_optimiser_must_not_move_moving_averages(data, tmp_path, monkeypatch, capsys):
    build = EMAQuantizer.__init__

    def with_gradient(self, *args, **kwargs):
        build(self, *args, **kwargs)
        self.codebooks.requires_grad_(True)

    monkeypatch.setattr(EMAQuantizer, "__init__", with_gradient)
    with pytest.raises(SystemExit):
        train(data, tmp_path / "run", *EMA)
    assert "an optimiser must not move them" in capsys.readouterr().err
