"""A continuous autoencoder (quantizer: none): posteriors, training, evaluation, and what it refuses."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from open_unitok.cli.main import main
from open_unitok.core.errors import UserError
from open_unitok.mllm import UniTokMLLMConfig
from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.tokenizer.quantizers import QUANTIZERS
from open_unitok.tokenizer.quantizers.none import kl_divergence, sample_posterior, split_moments

CONTINUOUS = [
    "model.quantizer=none",
    "model.codebook_dim=6",
    "losses.vq=0",
    "losses.entropy=0",
    "codebooks={}",
]
POSTERIORS = {
    "none": ["model.quantizer_options={posterior: none}"],
    "kl": ["model.quantizer_options={posterior: kl}", "losses.kl=1e-6"],
}


def train(data, out, posterior: str, *changes: str) -> UniTok:
    main(["train", str(data / "config.yaml"), f"out={out}", *CONTINUOUS, *POSTERIORS[posterior], *changes])
    return UniTok.from_pretrained(out / "model")


@pytest.fixture(scope="module")
def coda(golden):
    return load_file(golden / "quantizers" / "coda.safetensors")


@pytest.fixture(scope="module", params=POSTERIORS)
def trained(request, data, tmp_path_factory):
    """posterior, run directory and model after one step."""
    out = tmp_path_factory.mktemp(request.param) / "run"
    return request.param, out, train(data, out, request.param, "steps=1", "log.every=1")


def some_pixels() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_posterior_equals_the_golden_one(coda):
    tokens = {
        name: coda[f"posterior.{name}"] for name in ("in.moments", "in.noise", "out.mode", "out.sample")
    }
    flat = {name: value.flatten(2).transpose(1, 2) for name, value in tokens.items()}
    mean, log_variance = split_moments(flat["in.moments"])
    assert torch.equal(mean, flat["out.mode"]) and log_variance.max() <= 20 and log_variance.min() >= -30
    sample = sample_posterior(mean, log_variance, flat["in.noise"])
    torch.testing.assert_close(sample, flat["out.sample"], rtol=5e-6, atol=5e-6)
    torch.testing.assert_close(kl_divergence(mean, log_variance), coda["posterior.out.kl"], rtol=5e-6, atol=0)
    quantizer = QUANTIZERS["none"](8, 16, 3, posterior="kl").train()
    quantizer.noise = flat["in.noise"]
    out = quantizer(flat["in.moments"])
    torch.testing.assert_close(out.quantised, flat["out.sample"], rtol=5e-6, atol=5e-6)
    torch.testing.assert_close(out.losses["kl"], coda["posterior.out.kl"].mean(), rtol=5e-6, atol=0)
    assert torch.equal(quantizer.eval()(flat["in.moments"]).quantised, mean)


def test_it_trains_and_records_no_codes(trained):
    posterior, out, model = trained
    record = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["grad_norm"] > 0 and record["l2"] > 0 and ("kl" in record) == (posterior == "kl")
    assert not [key for key in record if key.startswith(("usage", "perplexity", "vq"))]
    assert model.encode_latents(some_pixels()).shape == (2, 4, 6)
    assert model.reconstruct(some_pixels()).shape == (2, 3, 32, 32)
    assert (model.variance_projection is not None) == (posterior == "kl")
    # evaluation takes the mode: two calls agree
    assert torch.equal(model(some_pixels()).reconstruction, model(some_pixels()).reconstruction)


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_every_parameter_learns(posterior):
    torch.manual_seed(0)
    fields = {"quantizer": "none", "quantizer_options": {"posterior": posterior}, "codebook_dim": 6}
    model = UniTok(UniTokConfig(**fields, **SMALL)).train()
    out = model(some_pixels(), torch.randint(1, 90, (2, 8)))
    clip = (out.image_embeds @ out.text_embeds.T * out.logit_scale).square().mean()
    (out.reconstruction.square().mean() + clip + sum(out.losses.values())).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_it_is_evaluated_without_codes(trained, tmp_path, capsys):
    _, out, _ = trained
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (40, 40), "red").save(images / "a.png")
    main(
        [
            "eval",
            "run",
            "reconstruction",
            "--model",
            str(out / "model"),
            "--data",
            str(images),
            "--out",
            str(tmp_path),
        ]
    )
    found = json.loads((tmp_path / "reconstruction" / "results.json").read_text())
    assert found["metrics"]["psnr"]["value"] > 0 and "codebook_usage_min" not in found["metrics"]
    main(
        ["reconstruct", str(images / "a.png"), "--model", str(out / "model"), "--out", str(tmp_path / "out")]
    )
    assert (tmp_path / "out" / "a.png").exists() and "PSNR" in capsys.readouterr().out


def test_everything_that_needs_codes_refuses(trained, data, tmp_path, capsys):
    _, out, model = trained
    line = "no codes"
    for call in (
        lambda: model.encode(some_pixels()),
        lambda: model.decode(torch.zeros(1, 4, 1, dtype=torch.long)),
        model.fingerprint,
        lambda: UniTokMLLMConfig.for_tokenizer(model.config),
    ):
        with pytest.raises(UserError, match=line):
            call()
    commands = [
        ["extract-codes", "--tokenizer", str(out / "model"), "--data", str(data / "pairs-0.tar"), "--out",
         str(tmp_path / "codes")],
    ]  # fmt: skip
    for command in commands:
        with pytest.raises(SystemExit):
            main(command)
        assert line in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "codes").exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        (["losses.vq=1.0"], "losses.vq is 1.0, but NoQuantizer has no such loss"),
        (["losses.kl=0.1"], "losses.kl is 0.1, but NoQuantizer has no such loss"),
        (["model.quantizer_options={posterior: kl}"], "losses.kl is 0: weigh it"),
        (["model.quantizer_options={posterior: sampled}"], "quantizer_options.posterior = 'sampled'"),
        (["codebooks={reset_after: 2}"], "codebooks.reset_after"),
        (["model.projection=none"], "projection = 'none' needs equal widths"),
    ],
)
def test_wrong_configs_stop_before_the_first_batch(changes, words, data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", str(data / "config.yaml"), f"out={tmp_path / 'run'}", *CONTINUOUS, *changes])
    lines = capsys.readouterr().err.strip().splitlines()
    assert words in lines[-1] and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_pyramid_needs_codes():
    with pytest.raises(UserError, match="inner = 'none'"):
        QUANTIZERS["residual"](1, 8, 4, inner="none", scales=[1, 2])


SMALL = {
    "image_size": 32,
    "stem_width": 8,
    "stage_widths": [8, 16],
    "stage_depths": [1, 1],
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "decoder_widths": [16, 8],
    "decoder_depths": [1, 1],
    "projection": "linear",
    "embed_dim": 16,
    "text_hidden_size": 16,
    "text_num_layers": 1,
    "text_num_heads": 2,
    "text_vocab_size": 100,
    "text_context_length": 8,
}
