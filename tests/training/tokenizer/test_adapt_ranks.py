"""Stage adapt: two ranks give the run of one process, and a stopped run resumes exactly."""

from pathlib import Path

import pytest
import torch
import yaml

from open_unitok.tokenizer import UniTok, UniTokConfig

from ..two_ranks import (
    assert_equal_files,
    assert_resumed_exactly,
    assert_two_ranks_equal_one_process,
    rows,
    train_all,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [8, 16, 16],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "scaling_factor": 0.5,
    "shift_factor": 0.2,
}
ATTENTION = {"attention_dim": 8}
PYRAMID = {"inner": "attention", "inner_options": ATTENTION, "scales": [1, 2, 4, 8], "detach": False}
# with the usual eps, gradients that are only rounding errors would change weights by the whole learning rate
COMMON = {"steps": 5, "batch_size": 4, "ema": 0.9, "ema_start": 2, "ema_pace": 2, "log": {"every": 1}}
COMMON |= {"checkpoint": {"every": 5}, "optimizer": {"lr": 2e-3, "eps": 1e-4}, "engine": {"threads": 1}}
GAN = {"kind": "patch", "width": 8, "layers": 1, "adaptive": "vqgan", "warmup": 5, "blur": False}
GAN |= {"augment": 0.0, "cutout": 0.0, "consistency": 0.0, "loss": "hinge_half"}
GAN |= {"optimizer": {"lr": 1e-3, "eps": 1e-4}}
LOSSES = {"clip": 0.0, "lpips": 0.0, "entropy": 0.05}
CASES = {
    "vae, pyramid, sample": {
        "model": {"quantizer": "residual", "quantizer_options": PYRAMID},
        "posterior": "sample",
        "losses": LOSSES | {"adversarial": 1.0},
        "discriminator": GAN,
    },
    "unitok, resets": {
        "model": {"quantizer": "attention", "quantizer_options": ATTENTION},
        "codebooks": {"init_images": 16, "reset_after": 2, "reset_share": 1.0},
        "losses": LOSSES,
        "save": "adapter",
    },
    # of the tokenizer stage: noise of the posterior
    "continuous": {"losses": LOSSES | {"vq": 0.0, "entropy": 0.0, "kl": 1e-4}},
}
UNITOK = {
    "image_size": 32,
    "stem_width": 8,
    "stage_widths": [8, 8],
    "stage_depths": [1, 1],
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "decoder_widths": [8, 8],
    "decoder_depths": [1, 1],
    "quantizer": "none",
    "quantizer_options": {"posterior": "kl"},
    "codebook_dim": 4,
    "embed_dim": 0,
}


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> Path:
    """Runs are named by the number of their case."""
    diffusers = pytest.importorskip("diffusers")
    folder, runs = tmp_path_factory.mktemp("adapt"), {}
    torch.manual_seed(0)
    diffusers.AutoencoderKL(**VAE).save_pretrained(folder / "vae")
    UniTok(UniTokConfig(**UNITOK)).save_pretrained(folder / "unitok")
    for number, (name, case) in enumerate(CASES.items()):
        base = name.partition(",")[0]
        layers = ["conv1", "conv2"] if base == "vae" else ["conv", "pool", "qkv"]
        own = {"stage": "tokenizer", "ema_start": None, "ema_pace": None, "model": UNITOK}
        if base != "continuous":
            own = {"stage": "adapt", "init_from": str(folder / base), "lora": {"rank": 2, "modules": layers}}
            case = case | {"model": case["model"] | {"codebook_size": 16, "image_size": 32}}
        config = COMMON | own | case
        config["data"] = {"sources": [{"path": f"{data}/pairs-*.tar"}], "shuffle": 16}
        config = {key: value for key, value in config.items() if value is not None} | {"out": "none"}
        file = folder / f"{number}.yaml"
        file.write_text(yaml.safe_dump(config))
        runs[str(number)] = (file, [])
    return train_all(folder, runs, stop_at=3)


# the last checkpoint has the merged weights in any case
CHECKPOINT = Path("checkpoints", "step-00000005", "model.safetensors")


@pytest.mark.parametrize("number", range(len(CASES)))
def test_two_ranks_equal_one_process(runs, number):
    assert_two_ranks_equal_one_process(runs, str(number), CHECKPOINT)


@pytest.mark.parametrize("ranks", ["", "-ranks"])
@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_stopped_run_resumes_exactly(runs, number, ranks):
    """Losses, merged weights, averages, and LoRA itself."""
    whole, resumed = runs / f"{number}{ranks}", runs / f"{number}{ranks}-resumed"
    assert_resumed_exactly(whole, resumed, CHECKPOINT)
    assert len(rows(whole)) == 5
    # without the checkpoint at which the run stopped
    names = [
        sorted(
            file.relative_to(out) for file in out.rglob("*.safetensors") if "step-00000003" not in file.parts
        )
        for out in (whole, resumed)
    ]
    assert names[0] == names[1] and names[0]
    for name in names[0]:
        assert_equal_files(whole / name, resumed / name)
