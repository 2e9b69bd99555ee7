"""Gaussians as tokens end to end: training, files, codes, evaluation, an MLLM, refusals."""

import json

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from open_unitok.cli.main import main
from open_unitok.core.errors import UserError
from open_unitok.generation import Pipeline, Sampling
from open_unitok.mllm import UniTokMLLMConfig
from open_unitok.tokenizer import UniTok
from open_unitok.training.data.code_shards import CodeFolder

NETWORK = {
    "channels": 8,
    "multipliers": [1, 2, 2],
    "residual_blocks": 1,
    "attention_levels": [],
    "norm_groups": 4,
}
MODEL = {
    "patch_size": 4,  # images of 32 pixels: a map of 8 x 8
    "token_layout": {"rows": 8, "columns": 8, "tokens": 10},
    "encoder": "gaussian",
    "encoder_options": {**NETWORK, "hidden_size": 16, "query_heads": 2},
    "decoder": "gaussian",
    "decoder_options": {**NETWORK, "hidden_size": 4},
    "quantizer": "gaussian",
    "quantizer_options": {"levels": [8, 8, 4, 3, 2]},
    "num_codebooks": 6,
    "codebook_size": 16,
    "codebook_dim": 9,
    "projection": "none",
}
CONTINUOUS = {"quantizer_options": {}, "num_codebooks": 1}
RUN = ["losses.entropy=0", "codebooks={init: kmeans, init_images: 8}", "log.every=1", "optimizer.eps=1e-4"]


def overrides(**changes) -> list[str]:
    """Overrides of the config of `data`; `changes` of `MODEL`."""
    return [f"model.{key}={json.dumps(value)}" for key, value in {**MODEL, **changes}.items()] + RUN


def train(data, out, *more, **changes):
    main(["train", str(data / "config.yaml"), f"out={out}", "steps=2", *overrides(**changes), *more])
    return out


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    return train(data, tmp_path_factory.mktemp("gaussian") / "run")


@pytest.fixture(scope="module")
def continuous(data, tmp_path_factory):
    return train(data, tmp_path_factory.mktemp("continuous") / "run", **CONTINUOUS)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    pixels = torch.randint(256, (40, 40, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)
    return path


def some_pixels() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def records(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]


def refused(capsys, *command):
    """The one line with which a command is refused."""
    with pytest.raises(SystemExit):
        main(list(command))
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("changes", [{}, CONTINUOUS])
def test_every_trainable_parameter_learns(run, continuous, changes):
    model = UniTok.from_pretrained((continuous if changes else run) / "model").train()
    out = model(some_pixels(), torch.randint(1, model.config.text_vocab_size, (2, 12)))
    pairs = (out.image_embeds @ out.text_embeds.T) * out.logit_scale
    clip = torch.nn.functional.cross_entropy(pairs, torch.arange(2))
    (out.reconstruction.square().mean() + clip + out.losses["vq"]).backward()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            assert weight.grad is not None and weight.grad.any() and weight.grad.isfinite().all(), name
        else:
            assert name == "quantizer.inner.codebooks"


def test_a_run_saves_codes_and_its_own_state(run, tmp_path):
    model = UniTok.from_pretrained(run / "model")
    codes = model.encode(some_pixels())
    assert codes.shape == (2, 10, 6) and (codes < torch.tensor([16, 8, 8, 4, 3, 2])).all()
    assert torch.equal(model.decode(codes), model.reconstruct(some_pixels()))
    assert 3 < float(model.quantizer.largest) < 4  # it fell with the steps
    model.save_pretrained(tmp_path)
    again = UniTok.from_pretrained(tmp_path)
    state, other = model.state_dict(), again.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)
    assert {"encoder.queries", "quantizer.largest", "quantizer.mean_scale"} <= state.keys()
    assert again.fingerprint() == model.fingerprint()
    usage = records(run)[-1]
    assert all(0 < usage[f"usage/{code}"] <= 100 for code in range(6))


def test_half_precision_keeps_the_places(run):
    """Codes and values of geometry do not pass through bfloat16 on the way to the splat."""
    model = UniTok.from_pretrained(run / "model").eval()
    codes, seen = model.encode(some_pixels()), []
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.decode(codes)
    model.to(torch.bfloat16).decode(codes)
    assert torch.equal(seen[0], seen[1])


def test_codes_are_extracted_and_evaluated(run, data, photo, tmp_path, capsys):
    main(["extract-codes", "--tokenizer", str(run / "model"), "--data", str(data / "pairs-0.tar"),
          "--out", str(tmp_path / "codes")])  # fmt: skip
    manifest = json.loads((tmp_path / "codes" / "codes.json").read_text())
    assert manifest["code_sizes"] == [16, 8, 8, 4, 3, 2] and manifest["layout"]["tokens"] == 10
    codes = CodeFolder(tmp_path / "codes", UniTok.from_pretrained(run / "model").fingerprint())
    assert codes.read(0, 0).images[0].shape == (10, 6)
    main(["reconstruct", str(photo), "--model", str(run / "model"), "--out", str(tmp_path)])
    assert "PSNR" in capsys.readouterr().out
    main(["eval", "run", "reconstruction", "--model", str(run / "model"), "--data", str(photo.parent),
          "--out", str(tmp_path / "eval")])  # fmt: skip
    result = json.loads((tmp_path / "eval" / "reconstruction" / "results.json").read_text())
    assert result["details"]["code_sizes"] == [16, 8, 8, 4, 3, 2]


def test_an_mllm_reads_and_generates_gaussians(run, data, golden, photo, tmp_path):
    main(["extract-codes", "--tokenizer", str(run / "model"), "--data", str(data / "pairs-0.tar"),
          "--out", str(tmp_path / "codes")])  # fmt: skip
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    mixture = [{"kind": kind, "path": str(tmp_path / "codes")} for kind in ("text_to_image", "captioning")]
    config = {
        "stage": "mllm",
        "out": str(tmp_path / "mllm"),
        "steps": 1,
        "batch_size": 2,
        "model": {
            "unitok": str(run / "model"),
            "text_tokenizer": str(golden / "mllm" / "tokenizer.model"),
            "text": {**sizes, "max_position_embeddings": 64},
            "depth": {"num_hidden_layers": 1},
            "processor": {"template": "plain"},
        },
        "data": {"mixture": mixture, "max_length": 64},
        "engine": {"threads": 1},
    }
    (tmp_path / "mllm.yaml").write_text(yaml.safe_dump(config))
    main(["train", str(tmp_path / "mllm.yaml")])
    pipe = Pipeline.from_pretrained(tmp_path / "mllm" / "model")
    sampling = Sampling(guidance=2.0, greedy=True)
    codes = pipe.generate_codes(["a red square"], sampling, seed=0)
    assert codes.shape == (1, 10, 6) and (codes < torch.tensor([16, 8, 8, 4, 3, 2])).all()
    assert pipe.decode(codes)[0].size == (32, 32)
    assert len(pipe.answer([photo], ["What is it"], max_new_tokens=2)) == 1
    # the projection is not as narrow as a latent of 9 numbers
    assert pipe.model.config.visual_hidden_size == pipe.unitok.config.hidden_size == 16
    embedder = pipe.model.visual_embedder
    rows = pipe.unitok.quantizer.embed(codes)
    torch.testing.assert_close(embedder.embed(codes), rows, rtol=0, atol=1e-6)


def test_continuous_geometry_reconstructs_and_says_its_bits(continuous, photo, tmp_path, capsys):
    line = "10 visual tokens of 164 bits: 4 of its code, 160 of continuous geometry"
    main(["reconstruct", str(photo), "--model", str(continuous / "model"), "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert line in out and "PSNR" in out
    main(["eval", "run", "reconstruction", "--model", str(continuous / "model"), "--data", str(photo.parent),
          "--out", str(tmp_path / "eval")])  # fmt: skip
    result = json.loads((tmp_path / "eval" / "reconstruction" / "results.json").read_text())
    assert result["metrics"]["bits_per_token"]["value"] == 164 and result["metrics"]["psnr"]["value"] > 0


def test_continuous_geometry_has_no_codes(continuous, data, tmp_path, capsys):
    model, line = UniTok.from_pretrained(continuous / "model"), "continuous geometry, 5 floats a token"
    for refuse in (model.encode, lambda pixels: model.fingerprint()):
        with pytest.raises(UserError, match=line):
            refuse(some_pixels())
    with pytest.raises(UserError, match=line):
        model.decode(torch.zeros(1, 10, 1, dtype=torch.int64))
    with pytest.raises(UserError, match=line):
        UniTokMLLMConfig.for_tokenizer(model.config)
    command = ["extract-codes", "--tokenizer", str(continuous / "model"), "--data"]
    assert line in refused(capsys, *command, str(data / "pairs-0.tar"), "--out", str(tmp_path / "codes"))


@pytest.mark.parametrize("changes", [{}, CONTINUOUS])
def test_a_stopped_run_resumes_exactly(run, continuous, data, tmp_path, capsys, changes):
    """Losses and weights, and the quantiser's state: counts, sums, the largest scale, the mean of scales."""
    whole, more = continuous if changes else run, ["checkpoint.every=2"]
    out = train(data, tmp_path / "run", *more, "stop_at=1", **changes)
    train(data, tmp_path / "run", *more, **changes)
    assert records(out) == records(whole)
    assert f"10 visual tokens of {164 if changes else 14.58} bits" in capsys.readouterr().err
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (out, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert {"quantizer.inner.size", "quantizer.inner.total", "quantizer.largest"} <= ours.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_layout": {"rows": 8, "columns": 8}}, "needs the number of its Gaussians"),
        ({"token_layout": {"rows": 8, "columns": 8, "tokens": -1}}, "tokens at least 0"),
        ({"token_layout": {"rows": 8, "columns": 9, "tokens": 10}}, "image_size = 32 is not the longer side"),
        (
            {"token_layout": {**MODEL["token_layout"], "registers": 1}},
            "num_register_tokens = 1",
        ),
        ({"quantizer_options": {"levels": [8, 8, 4, 3]}}, "expected 5 numbers from 2"),
        ({"quantizer_options": {"levels": [32, 8, 4, 3, 2]}}, "codebook_size = 16 must be at least"),
        ({"quantizer_options": {}}, "6"),
        ({"quantizer": "nearest", "quantizer_options": {}}, "needs quantizer 'gaussian', not 'nearest'"),
        ({"projection": "linear"}, "needs projection 'none', not 'linear'"),
        ({"decoder": "vitamin", "decoder_options": {}}, "decoder 'vitamin' has patches of 16"),
        ({"patch_size": 8, "token_layout": None}, "needs the number of its Gaussians"),
        ({"encoder_options": {"rounds": 0}}, "encoder_options.rounds is 0"),
        ({"encoder_options": {"channel": 4}}, "encoder_options.channel is not an option"),
        ({"encoder_options": {**NETWORK, "query_heads": 3}}, "encoder_options.query_heads is 3"),
        ({"codebook_dim": 5}, "codebook_dim = 5: a token has 5 numbers of geometry"),
    ],
)
def test_bad_configs_are_refused_before_the_first_batch(data, tmp_path, capsys, changes, message):
    line = refused(
        capsys,
        "train",
        str(data / "config.yaml"),
        f"out={tmp_path / 'run'}",
        "steps=1",
        *overrides(**changes),
    )
    assert message in line and not (tmp_path / "run" / "metrics.jsonl").exists()
