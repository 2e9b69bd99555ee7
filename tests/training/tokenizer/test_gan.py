"""The tokenizer stage with a GAN: schedule, exact resume, ranks, errors; resuming with other ranks."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from open_unitok.cli.main import main
from open_unitok.core.errors import UserError
from open_unitok.training.core import deepspeed_engine
from open_unitok.training.core.saving.integrity import check_complete
from open_unitok.training.run import load_run_config
from open_unitok.training.tokenizer.gan import GAN

from ..two_ranks import launch

PATCH = [
    "losses.adversarial=0.4",
    "discriminator={kind: patch, width: 8, layers: 2, start: 2, warmup: 3, schedule: {warmup: 1}}",
]


def train(data, out, *overrides):
    main(["train", str(data / "config.yaml"), f"out={out}", *overrides])


def rows(out):
    """The records of metrics.jsonl without times and speeds."""
    with open(out / "metrics.jsonl") as file:
        found = [json.loads(line) for line in file]
    return [{k: v for k, v in row.items() if "second" not in k} for row in found]


def test_gan_schedule(data):
    """The weight ramps up, the blur fades over twice as many steps, the rate has its own schedule."""
    config = load_run_config(
        str(data / "config.yaml"),
        [
            "losses.adversarial=0.4",
            "discriminator={kind: patch, width: 4, layers: 1, start: 3, warmup: 2}",
            "discriminator.schedule={warmup: 2, end: 0.1, kind: lin00}",
            "discriminator.optimizer={lr: 1.0}",
        ],
    )
    deepspeed_engine.init_distributed(config.engine, 0)
    gan = GAN(config, (32, 32), torch.device("cpu"), 8)
    found = []
    for step in range(8):
        gan.start_step(step)
        found.append((gan.weight, gan.blur, gan.lr))
    weights, blurs, rates = zip(*found)
    assert weights == pytest.approx([0, 0, 0, 0, 0.2, 0.4, 0.4, 0.4])
    assert blurs == pytest.approx([1, 1, 1, 1, 0.75, 0.5, 0.25, 0])
    assert rates == pytest.approx([0, 0, 0, 0, 0.5, 1.0, 0.55, 0.1])
    reconstruction = torch.zeros(8, 3, 32, 32)
    gan.start_step(3)
    assert not any(
        v.any()
        for v in (
            gan.generator_step(reconstruction.sum(), reconstruction, reconstruction)
            | gan.discriminator_step(reconstruction, reconstruction)
        ).values()
    )


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted run of 8 steps with a discriminator from the third on."""
    out = tmp_path_factory.mktemp("gan") / "run"
    train(data, out, *PATCH)
    return out


def test_the_gan_starts_at_its_step(data, whole):
    found = rows(whole)
    for row in found[:3]:
        assert row["adversarial_weight"] == row["discriminator"] == row["discriminator_grad_norm"] == 0
        assert row["discriminator_lr"] == 0
    for row in found[3:]:
        assert (
            row["adversarial_weight"] > 0 and row["discriminator"] > 0 and row["discriminator_grad_norm"] > 0
        )
        assert row["discriminator_lr"] > 0 and row["consistency"] > 0
        parts = 0.2 * row["l1"] + row["l2"] + row["vq"] + 0.1 * row["entropy"] + row["clip"]
        assert row["loss"] == pytest.approx(parts + row["adversarial_weight"] * row["adversarial"], rel=1e-5)


@pytest.mark.parametrize(("stage", "workers"), [(0, 0), (2, 1)])
def test_resume_is_bit_identical(data, whole, tmp_path, stage, workers):
    """With the discriminator, its moments and views; ZeRO 2 with a worker has its own uninterrupted run."""
    more = []
    if (stage, workers) != (0, 0):
        options = f"zero_stage: {stage}, accumulation: 2, gradient_checkpointing: true, threads: 1"
        more = [f"engine={{{options}}}", f"data.workers={workers}"]
        whole = tmp_path / "whole"
        train(data, whole, *PATCH, *more)
    out = tmp_path / "run"
    train(data, out, *PATCH, *more, "stop_at=4")
    train(data, out, *PATCH, *more)
    assert rows(out) == rows(whole)
    first, second = (load_file(folder / "model" / "model.safetensors") for folder in (out, whole))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_with_dino(data, dino_file, tmp_path, dtype):
    settings = ["losses.adversarial=0.4", "discriminator={norm: sbn, spectral_norm: true, loss: softplus}"]
    settings += [
        f"discriminator.weights={dino_file.parent}",
        "discriminator.adaptive=sqrt",
        f"engine.dtype={dtype}",
    ]
    train(data, tmp_path / "run", *settings, "steps=2", "checkpoint.every=2", "reconstruct_share=0.5")
    last = rows(tmp_path / "run")[-1]
    assert last["discriminator_grad_norm"] > 0 and last["adversarial_weight"] > 0
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} <= {torch.float32, torch.int64}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["losses.adversarial=0.4"], "dinov2_vits14_pretrain.pth"),
        (["losses.adversarial=0.4", "discriminator.weights=nowhere/dino.pth"], "dinov2_vits14_pretrain.pth"),
        (["losses.adversarial=0.4", "discriminator.kind=patsh"], "Did you mean 'patch'"),
        ([*PATCH, "discriminator.start=8"], "discriminator.start is 8, but the run has 8 steps"),
        ([*PATCH, "discriminator.loss=hing"], "Did you mean 'hinge'"),
        (
            [*PATCH, "discriminator.adaptive=7"],
            "discriminator.adaptive is 7. Allowed: capped, floor, narrow, sqrt, vqgan",
        ),
        ([*PATCH, "discriminator.adaptive=1"], "Allowed: capped, floor"),
        ([*PATCH, "discriminator.augment=2"], "discriminator.augment is 2"),
        ([*PATCH, "discriminator.layers=9"], "use fewer layers"),
        ([*PATCH, "losses.l1=0", "losses.l2=0"], "discriminator.adaptive=null"),
        ([*PATCH, "init_from=HERE", "freeze=[decoder]"], "freeze holds decoder"),
        (["init_from=HERE", "freeze=[quantizer]"], "would change its entries"),
        (["init_from=HERE", "init_from_clip=HERE"], "keep one of them"),
        (["init_from_clip=nowhere.bin"], "nowhere.bin does not exist"),
        (["resume_from=nowhere"], "nowhere is not a complete checkpoint"),
        (["profile.steps=-1"], "profile.steps"),
    ],
)
def test_config_errors_stop_before_the_first_batch(data, tmp_path, capsys, overrides, words):
    with pytest.raises(SystemExit) as left:
        train(data, tmp_path / "run", *(text.replace("HERE", str(data)) for text in overrides))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert left.value.code == 2 and last.startswith("unitok: error:") and words in last
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_two_ranks_equal_one_process(data, dino_file, tmp_path, stage):
    """With discriminator, entropy, augmentation, drop path and partial decoding the losses agree to 1e-4,
    until rounding, which depends on the processor, changes a code with two almost equally near entries."""
    discriminator = PATCH if stage == 0 else ["losses.adversarial=0.4", f"discriminator.weights={dino_file}"]
    drop = ["model.num_hidden_layers=2", "model.drop_path_rate=0.4", "reconstruct_share=0.5"]
    settings = [*discriminator, *drop, "steps=10", "log.images_every=0", "checkpoint.every=10"]
    single, both = tmp_path / "single", tmp_path / "both"
    train(data, single, *settings)
    command = ["-m", "open_unitok", "train", data / "config.yaml", f"out={both}", *settings]
    launch(*command, f"engine.zero_stage={stage}")
    assert len(rows(both)) == 10 and rows(both)[-1]["discriminator_grad_norm"] > 0
    for one, two in zip(rows(single), rows(both), strict=True):
        if one["step"] > 6:
            assert two["loss"] == pytest.approx(one["loss"], rel=0.02)
            continue
        for name in (
            "loss",
            "l1",
            "l2",
            "vq",
            "entropy",
            "clip",
            "adversarial",
            "discriminator",
            "consistency",
        ):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-4), (one["step"], name)


# ---- other ranks, other workers --------------------------------------------------------------------------


def test_another_number_of_workers_is_rejected(data, whole, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(data, whole, *PATCH, "data.workers=1")
    with pytest.raises(SystemExit):
        train(data, whole, *PATCH, "data.workers=1", "steps=9")
    first, second = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert f"resume_from={whole}/checkpoints/step-00000008" in first and "data.workers: 0 -> 1" in first
    assert "init_from=" in second
    out = tmp_path / "run"
    train(data, out, *PATCH, "data.workers=1", f"resume_from={whole}/checkpoints/step-00000006")
    assert [row["step"] for row in rows(out)] == [7, 8]
    assert rows(out)[0]["l2"] == pytest.approx(rows(whole)[6]["l2"], rel=0.2)
    assert rows(out)[0]["discriminator_lr"] == rows(whole)[6]["discriminator_lr"]
    train(data, tmp_path / "other", *PATCH, f"resume_from={whole}/checkpoints/step-00000006", "stop_at=7")
    train(data, tmp_path / "other", *PATCH, f"resume_from={whole}/checkpoints/step-00000006")
    assert [row["step"] for row in rows(tmp_path / "other")] == [7, 8]


def test_a_config_without_a_newer_key_resumes(data, tmp_path):
    out = tmp_path / "run"
    train(data, out, "stop_at=3")
    old = (out / "config.yaml").read_text()
    kept = [line for line in old.splitlines() if not line.startswith(("init_from_clip", "resume_from"))]
    assert len(kept) == len(old.splitlines()) - 2
    (out / "config.yaml").write_text("\n".join(kept))
    train(data, out, "stop_at=4")
    assert rows(out)[-1]["step"] == 4


def test_profile(data, tmp_path):
    out = tmp_path / "run"
    train(data, out, "stop_at=4", "profile={start: 1, steps: 2}")
    assert sorted(os.listdir(out / "profile")) == ["steps-2-3.json.gz", "steps-2-3.txt"]
    assert "Self CPU" in (out / "profile" / "steps-2-3.txt").read_text()


def test_speed_is_recorded(data, tmp_path):
    """Each record has the FLOP/s and their share of the peak in the config."""
    out = tmp_path / "run"
    train(data, out, "stop_at=2", "log.peak_tflops=2.0")
    with open(out / "metrics.jsonl") as file:
        for row in map(json.loads, file):
            assert row["tflops_per_second"] > 0
            assert row["mfu"] == pytest.approx(row["tflops_per_second"] / 2)


def test_the_text_tower_is_counted_by_hand():
    from open_unitok.tokenizer import UniTokConfig
    from open_unitok.training.core.flops import tokenizer_flops

    width, layers, length, joint = 64, 2, 12, 32
    config = UniTokConfig(
        image_size=32,
        stem_width=8,
        stage_widths=[8, 8],
        stage_depths=[1, 1],
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        decoder_widths=[8, 8],
        decoder_depths=[1, 1],
        embed_dim=joint,
        text_hidden_size=width,
        text_num_heads=2,
        text_num_layers=layers,
        text_context_length=length,
        text_vocab_size=50,
    )
    found = tokenizer_flops(config, True) - tokenizer_flops(config, False)
    block = 12 * width**2 * length + 2 * length**2 * width  # qkv, out, two of the MLP; scores and their use
    assert found == 3 * 2 * (layers * block + width * joint)
    half = tokenizer_flops(config, False, 0.5)
    whole, none = (tokenizer_flops(config, False, share) for share in (1.0, 0.0))
    assert half == pytest.approx((whole + none) / 2) and 0 < none < whole


def test_a_damaged_checkpoint_is_not_resumed(data, whole, tmp_path):
    broken = tmp_path / "step-00000008"
    shutil.copytree(whole / "checkpoints" / "step-00000008", broken)
    (broken / "training_state" / "rank-00000.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"rank-00000\.pt has 0 bytes"):
        check_complete(broken)
