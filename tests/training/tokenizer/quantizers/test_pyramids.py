"""A pyramid from training to codes: scale drop, resets, resume, extraction, reconstruction."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from open_unitok.cli.main import main
from open_unitok.tokenizer import QUANTIZERS, UniTok
from open_unitok.training.data.code_shards import CodeFolder
from open_unitok.training.data.mixture import codes_layout
from open_unitok.training.tokenizer.dead_codes import DeadCodes

from ...two_ranks import launch_jobs, rows

OPTIONS = (
    "{inner: shared_index, inner_options: {block_widths: [3, 1]}, scales: [1, 2, 4], scale_drop: 0.5, "
    "shared_convolutions: 2}"
)


MODEL = ("model.image_size=64", "model.quantizer=residual", f"model.quantizer_options={OPTIONS}")


def train(data, out, *changes):
    main(["train", str(data / "config.yaml"), f"out={out}", "steps=6", *MODEL, *changes])
    return rows(out)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("pyramid") / "run"
    return out, train(data, out)


def test_resume_is_exact(data, whole, tmp_path):
    """Dropped scales, dead-code resets and usage equal those of an uninterrupted run."""
    train(data, tmp_path / "run", "stop_at=3")
    assert train(data, tmp_path / "run") == whole[1]


@pytest.mark.slow
def test_two_ranks_equal_one_process(data, whole, tmp_path):
    """Both leave out the same scales; the keys do not depend on the rank."""
    config = str(data / "config.yaml")
    overrides = [f"out={tmp_path / 'run'}", "steps=6", *MODEL, "losses.clip=0", "optimizer.eps=1e-4"]
    launch_jobs([{"config": config, "overrides": overrides}], "tokenizer", tmp_path)
    single = train(data, tmp_path / "single", "losses.clip=0", "optimizer.eps=1e-4")
    for one, two in zip(single, rows(tmp_path / "run")):
        for name in ("loss", "l2", "vq", "entropy", "usage/0", "perplexity/1"):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4), (one["step"], name)


def test_codes_and_images_of_a_trained_pyramid(data, whole, tmp_path, capsys):
    model = UniTok.from_pretrained(whole[0] / "model")
    source = ["--tokenizer", str(whole[0] / "model"), "--data", str(data / "pairs-0.tar")]
    main(["extract-codes", *source, "--out", str(tmp_path / "codes"), "--device", "cpu"])
    folder = CodeFolder(tmp_path / "codes", model.fingerprint())
    assert folder.shape == (21, 2) and folder.manifest["scales"] == [1, 2, 4]
    assert codes_layout(folder).grid == (4, 4)
    codes = torch.from_numpy(folder.read(0, 3).codes.astype("int64"))[None]
    assert model.decode(codes).shape == (1, 3, 64, 64)
    main(["data", "check", str(tmp_path / "codes")])
    assert "21 x 2 per image" in capsys.readouterr().out
    Image.new("RGB", (70, 90), "red").save(tmp_path / "red.png")
    call = ["reconstruct", str(tmp_path / "red.png"), "--model", str(whole[0] / "model"), "--device", "cpu"]
    main([*call, "--out", str(tmp_path / "out")])
    assert Image.open(tmp_path / "out" / "red.png").size[1] >= 64
    with pytest.raises(SystemExit) as left:
        main([*call, "--out", str(tmp_path / "out"), "--size", "32"])
    assert left.value.code == 2
    assert "scales need square images of 64 pixels; this one has 32 x 32" in capsys.readouterr().err


def test_dead_codes_are_reset_to_the_rest_of_the_last_scale():
    torch.manual_seed(0)
    quantizer = QUANTIZERS["residual"](2, 64, 4, scales=[1, 2, 4], inner="nearest").train()
    dead_codes = DeadCodes(quantizer, reset_after=1, last_step=9, seed=0)
    latents = torch.randn(2, 16, 8)
    codes = quantizer(latents).codes
    coarse = quantizer.embed(codes[:, :5]).detach()
    rest = quantizer.split(latents - coarse).flatten(0, 1)  # (32, K, C)
    zero_stage_0 = SimpleNamespace(zero_optimization=lambda: False, optimizer=SimpleNamespace(state={}))
    reset = dead_codes.reset_codes(1, zero_stage_0)
    used = torch.zeros(2, 64, dtype=torch.bool)
    used[torch.arange(2).expand_as(codes), codes] = True
    assert torch.equal(reset, ~used)
    for book in range(2):
        new = quantizer.codebooks[book][~used[book]].detach()
        difference = (new[:, None] - rest[:, book]).abs().amax(dim=-1)  # (entries, tokens)
        assert difference.min(dim=1).values.max() < 1e-5
