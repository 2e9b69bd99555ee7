"""Quantisers and their options that do not fit: one line before the first batch, and no run directory."""

import pytest

from open_unitok.cli.main import main
from open_unitok.core.errors import UserError
from open_unitok.tokenizer import UniTok
from open_unitok.training.run import load_run_config
from open_unitok.training.tokenizer.model import build_model, load_caption_tokenizer

from ....tokenizer.quantizers.kinds import overrides

LANGUAGE = ["model.quantizer=language", "model.num_codebooks=3"]
PYRAMID = ["model.quantizer=residual", "losses.entropy=0"]
TEACHER = "teacher={kind: contrast, model: none, contrast_group: %d}"

BAD = {
    "odd halves": (
        [*LANGUAGE, "model.codebook_dim=5", "model.projection=linear"],
        "codebook_dim is 5: .* cuts it into two halves",
    ),
    "two of three codes": (["model.quantizer=language"], "num_codebooks is 2, but .* has 3 codes per token"),
    "heads do not divide": (
        ["model.projection_heads=3"],
        "would have 3 heads, which do not divide 16: set projection_heads",
    ),
    "blocks do not add up": (
        ["model.quantizer=shared_index", "model.quantizer_options={block_widths: [3, 2]}"],
        "block_widths .*3, 2.* 4",
    ),
    "scales fall": ([*PYRAMID, "model.quantizer_options={scales: [2, 1]}"], r"scales = \[2, 1\]: rising"),
    "scales stay": ([*PYRAMID, "model.quantizer_options={scales: [2, 2]}"], r"scales = \[2, 2\]: rising"),
    "no scales": (PYRAMID, r"scales = \[\]: rising sides are needed"),
    "scales end early": ([*PYRAMID, "model.quantizer_options={scales: [1]}"], r"scales = \[1\].* 2"),
    "scales of an oblong grid": (
        [
            *PYRAMID,
            "model.quantizer_options={scales: [1, 2]}",
            "model.token_layout={rows: 1, columns: 2}",
        ],
        "scales need square images",
    ),
    "scales with registers": (
        [*PYRAMID, "model.quantizer_options={scales: [1, 2]}", "model.num_register_tokens=2"],
        "num_register_tokens = 2 together with scales",
    ),
    "a pyramid of pyramids": (
        [*PYRAMID, "model.quantizer_options={scales: [1, 2], inner: residual}"],
        "inner = 'residual'.* Allowed: ",
    ),
    "few latents for k-means": (
        ["codebooks={init: kmeans, init_images: 3}"],
        "kmeans with 12 latents, fewer than 16 entries: raise codebooks.init_images",
    ),
    "k-means of rows that are not unit": (
        [*overrides("nearest"), "codebooks={init: kmeans, init_images: 8}"],
        "init is kmeans, which is by cosine, .* have no unit norm",
    ),
    "a rate for rows without an optimiser": (
        [*overrides("ema"), "codebooks={}", "lr_factors={quantizer: 0.1}"],
        "lr_factors.quantizer names the rows of EMAQuantizer, which no optimiser moves",
    ),
    "resets of rows that move": (
        [*overrides("ema"), "codebooks={reset_after: 2}"],
        "codebooks.reset_after is 2, but the rows of EMAQuantizer move",
    ),
    "a group of one image": (
        ["losses.teacher=1", TEACHER % 1],
        "contrast_group is 1, .* one image has nothing to compare",
    ),
    "a last group of one image": (
        ["losses.teacher=1", TEACHER % 7],
        "contrast_group is 7, with 8 images .* one image has nothing to compare",
    ),
    "a batch of one image": (
        ["losses.teacher=1", TEACHER % 32, "batch_size=1"],
        "with 1 images per forward pass: a group of one image",
    ),
    "an option of another kind": (
        ["model.quantizer_options={decay: 0.9}"],
        "quantizer_options.decay is not an option of quantizer 'multi_codebook'",
    ),
    "an option of another inner kind": (
        [*PYRAMID, "model.quantizer_options={scales: [1, 2], inner_options: {decay: 0.9}}"],
        "decay is not an option of .*'multi_codebook'",
    ),
    "a loss of another kind": (
        [*overrides("ibq"), "codebooks={}", "losses.disentangle=0.1"],
        "losses.disentangle is 0.1, but IBQQuantizer has no such loss",
    ),
    "one book to disentangle": (
        ["model.num_codebooks=1", "losses.disentangle=0.1"],
        "disentangle.* two|disentangle.*num_codebooks",
    ),
    "a loss without a quantiser": (
        ["losses.extra={other: 1.0}"],
        "losses.extra has 'other', but MultiCodebookQuantizer has no such loss, only vq",
    ),
    "no entropy loss": ([*overrides("nearest"), "losses.entropy=0.1"], "has no entropy loss"),
    "an unknown gradient": (
        ["model.quantizer_options={gradient: none}"],
        "gradient is 'none': it must be straight_through or rotation",
    ),
    "a decay of one": (
        [*overrides("ema"), "codebooks={}", "model.quantizer_options={decay: 1.0}"],
        "decay is 1.0: it must be from 0 to below 1",
    ),
    "random and images": (["codebooks={init: random, init_images: 8}"], "init is random, but"),
}


@pytest.mark.parametrize("name", BAD)
def test_is_refused_in_one_line_before_the_first_batch(data, tmp_path, capsys, name):
    changes, words = BAD[name]
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(data / "config.yaml"), f"out={tmp_path / 'run'}", "steps=2", *changes])
    lines = [line for line in capsys.readouterr().err.splitlines() if "Warning" not in line]
    assert stopped.value.code == 2 and lines[-1].startswith("unitok: error: ")
    with pytest.raises(UserError, match=words):  # for pytest's message where it does not match
        raise UserError(lines[-1])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_rows_of_moving_averages_get_no_optimiser(data, monkeypatch):
    """Also where a caller has made them require a gradient."""
    config = load_run_config(str(data / "config.yaml"), [*overrides("ema"), "codebooks={}"])
    captions = load_caption_tokenizer(config)
    assert not build_model(config, captions).quantizer.codebooks.requires_grad
    original = UniTok.__init__

    def learns(self, config):
        original(self, config)
        self.quantizer.codebooks.requires_grad_(True)

    monkeypatch.setattr(UniTok, "__init__", learns)
    with pytest.raises(UserError, match="rows of EMAQuantizer follow the latents: an optimiser must not"):
        build_model(config, captions)
