"""The tokenizer stage on tiny images: exact resume, outputs of a run, errors."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from open_unitok.cli.main import main
from open_unitok.core.errors import UserError
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.caption_tokenizer import CaptionTokenizer
from open_unitok.training.run import load_run_config
from open_unitok.training.tokenizer import losses as tokenizer_losses

from ..two_ranks import launch


def train(data, out, *overrides):
    main(["train", str(data / "config.yaml"), f"out={out}", *overrides])


def rows(out):
    """The records of metrics.jsonl without times and speeds."""
    with open(out / "metrics.jsonl") as file:
        found = [json.loads(line) for line in file]
    return [{k: v for k, v in row.items() if "second" not in k} for row in found]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted run of 8 steps."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(data, out)
    return out


def same_weights(one, two):
    first, second = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_outputs_of_a_run(whole):
    assert {p.name for p in whole.iterdir()} == {
        *(".lock", "config.yaml", "run.json", "metrics.jsonl", "tensorboard", "checkpoints", "model")
    }
    assert sorted(os.listdir(whole / "checkpoints")) == ["step-00000006", "step-00000008"]
    record = json.loads((whole / "run.json").read_text())
    assert {"command", "git", "versions", "facts", "calls"} <= record.keys() and record["facts"]["data"]
    last = rows(whole)[-1]
    assert last["step"] == 8 and len(rows(whole)) == 8
    assert {
        "loss",
        "l1",
        "l2",
        "vq",
        "entropy",
        "clip",
        "grad_norm",
        "lr",
        "usage/0",
        "perplexity/1",
    } <= last.keys()
    model = UniTok.from_pretrained(whole / "model")
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    assert model.decode(model.encode(pixels)).shape == pixels.shape
    captions = CaptionTokenizer.from_model_folder(whole / "model", 12)
    assert captions.vocab_size == model.config.text_vocab_size
    assert (
        UniTok.from_pretrained(whole / "checkpoints" / "step-00000008").fingerprint() == model.fingerprint()
    )


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resume_is_bit_identical(data, whole, tmp_path, accumulation):
    """Losses, weights, EMA, dead-code resets, crops, captions and drop path equal an uninterrupted run."""
    if accumulation > 1:
        whole = tmp_path / "whole"
        train(data, whole, "engine.accumulation=2")
    out = tmp_path / "run"
    train(data, out, "stop_at=4", f"engine.accumulation={accumulation}")
    assert not (out / "model").exists()
    train(data, out, f"engine.accumulation={accumulation}")
    assert rows(out) == rows(whole)
    assert same_weights(out / "model", whole / "model")
    assert any(row["skipped"] == 0 for row in rows(out))


def test_records_of_several_steps_resume(data, whole, tmp_path):
    """After a stop between two records, the next record still averages all steps since the last one."""
    for out, stops in ((tmp_path / "whole", [[]]), (tmp_path / "run", [["stop_at=4"], []])):
        for stop in stops:
            train(data, out, "log.every=3", *stop)
    assert [row["step"] for row in rows(tmp_path / "run")] == [3, 6, 8]
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_records_after_the_checkpoint_are_dropped_after_a_kill(data, whole, tmp_path):
    out = tmp_path / "run"
    train(data, out, "stop_at=3")
    with open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 4, "loss": 9}) + '\n{"step": 5, "lo')
    train(data, out)
    assert rows(out) == rows(whole)


def test_a_finished_run_is_recognised_at_once(data, whole, capsys):
    started = time.perf_counter()
    train(data, whole)
    assert time.perf_counter() - started < 1
    assert "is finished" in capsys.readouterr().out


def test_the_loss_falls_on_one_batch(data, tmp_path):
    out = tmp_path / "run"
    same = ["steps=60", "batch_size=20", "images.crop_scale=[1.0,1.0]", "images.crop_ratio=[1.0,1.0]"]
    settings = ["losses.entropy=0", "log.every=10", "checkpoint.every=60", "optimizer.lr=5e-3", "ema=null"]
    train(data, out, *same, *settings, "data.shuffle=1", f"data.sources.0.path={data}/pairs-0.tar")
    found = rows(out)
    assert found[-1]["l2"] < 0.6 * found[0]["l2"]
    assert found[-1]["clip"] < found[0]["clip"]


@pytest.mark.slow
def test_one_batch_can_be_overfitted(data, tmp_path):
    """Twenty images are reconstructed to a mean squared error of 0.04 (range 2): 20 dB."""
    same = ["steps=300", "batch_size=20", "images.crop_scale=[1.0,1.0]", "images.crop_ratio=[1.0,1.0]"]
    reconstruction_only = [
        "losses.entropy=0",
        "losses.clip=0",
        "ema=null",
        "data.shuffle=1",
        "decoder_init=kaiming",
    ]
    settings = ["optimizer.lr=3e-3", "optimizer.weight_decay=0", "checkpoint.every=300", "log.every=50"]
    out = tmp_path / "run"
    train(data, out, *same, *reconstruction_only, *settings, f"data.sources.0.path={data}/pairs-0.tar")
    assert rows(out)[0]["l2"] > 0.2 and rows(out)[-1]["l2"] < 0.04


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.hidden_sise=8", "Did you mean 'hidden_size'"),
        ("model.size=vitamin_huge", "vitamin"),
        ("model.image_size=30", "image_size"),
        ("data.sources.0.path=nowhere/*.tar", "no file matches nowhere"),
        ("caption_tokenizer=nowhere.model", "nowhere.model"),
        ("losses={lpips: 1.0, lpips_weights: nowhere.pth}", "nowhere.pth"),
        ("init_from=nowhere", "nowhere"),
        ("model={}", "'model' is missing"),
        ("batch_size=7", "multiple of 2"),
        ("model.text_vocab_size=9", "leave the key out"),
    ],
)
def test_config_errors_stop_before_the_first_batch(data, tmp_path, capsys, override, words):
    with pytest.raises(SystemExit) as left:
        train(data, tmp_path / "run", override, "engine.accumulation=2")
    error = capsys.readouterr().err
    assert left.value.code == 2
    last = error.strip().splitlines()[-1]
    assert last.startswith("unitok: error:") and words in last, error
    assert not (tmp_path / "run").exists()


def test_nan_stops_and_keeps_the_checkpoint(data, tmp_path, monkeypatch):
    original = tokenizer_losses.reconstruction_losses
    calls = []

    def poisoned(reconstruction, pixels):
        calls.append(1)
        losses = original(reconstruction, pixels)
        return {**losses, "l2": losses["l2"] * float("nan")} if len(calls) == 5 else losses

    monkeypatch.setattr("open_unitok.training.tokenizer.train.reconstruction_losses", poisoned)
    config = load_run_config(str(data / "config.yaml"), [f"out={tmp_path}/run"])
    from open_unitok.training.core.run_dir import RunDir
    from open_unitok.training.tokenizer import train as tokenizer_stage

    with pytest.raises(UserError) as error:
        tokenizer_stage.main(config, RunDir.open(config))
    assert "Step 5 is not finite" in str(error.value)
    assert all(f"{name}=" in str(error.value) for name in ("loss", "l1", "l2", "vq", "clip", "grad_norm"))
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-00000003"]


def test_another_config_is_rejected(data, whole, capsys):
    with pytest.raises(SystemExit):
        train(data, whole, "optimizer.lr=1e-3")
    assert "optimizer.lr: 0.002 -> 0.001" in capsys.readouterr().err


def test_frozen_parts_keep_the_weights_of_init_from(data, whole, tmp_path):
    out = tmp_path / "run"
    start = [
        f"init_from={whole}/model",
        "freeze=[encoder, down_projection, quantizer]",
        "codebooks={}",
        "steps=2",
    ]
    train(data, out, *start, "ema=null")
    bare = ["model={}", "losses.clip=0", "caption_tokenizer=null"]  # sizes are those of init_from
    train(data, tmp_path / "bare", *start, *bare, "ema=null")
    before, *found = (UniTok.from_pretrained(folder / "model") for folder in (whole, out, tmp_path / "bare"))
    assert (tmp_path / "bare" / "model" / "caption_tokenizer").exists()
    for after in found:
        assert (
            before.fingerprint() == after.fingerprint()
            and before.config.to_diff_dict() == after.config.to_diff_dict()
        )
        weight = "decoder.norm.weight"
        assert not torch.equal(before.get_parameter(weight), after.get_parameter(weight))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_resumes(data, whole, tmp_path, number):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "open_unitok", "train", str(data / "config.yaml"), f"out={out}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (out / "metrics.jsonl").exists():
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    if process.returncode:  # the run may have finished before the signal
        assert process.returncode == (143 if number == signal.SIGTERM else 130)
        assert "run the same command again" in error
        assert subprocess.run(command).returncode == 0
    assert rows(out) == rows(whole)
    assert same_weights(out / "model", whole / "model")


@pytest.mark.slow
def test_resume_after_a_kill(data, whole, tmp_path):
    """kill -9 as soon as a checkpoint exists; the next run ends with the same weights."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "open_unitok", "train", str(data / "config.yaml"), f"out={out}"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not list((out / "checkpoints").glob("step-*")):
        time.sleep(0.01)
        assert process.poll() is None
    process.kill()
    process.wait()
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
    assert rows(out) == rows(whole)
    assert same_weights(out / "model", whole / "model")


KILLED_DURING_THE_SECOND_SAVE = """
import os, signal, sys
from open_unitok.cli.main import main
from open_unitok.training.core import checkpoint
from open_unitok.training.tokenizer import train as tokenizer_stage

where, calls = sys.argv[1], []
module, name = {
    "weights": (tokenizer_stage, "save_model"),  # half of the weights file is written
    "manifest": (checkpoint, "write_manifest"),  # all files but the manifest
    "renaming": (os, "replace"),  # the manifest too, under its temporary name
}[where]
original = getattr(module, name)

def deadly(*arguments, **options):
    if name != "replace" or str(arguments[1]).endswith(("step-00000003", "step-00000006")):
        calls.append(1)
    if len(calls) == 2:
        if where == "weights":
            (arguments[0] / "model.safetensors").write_bytes(bytes(100))
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)

setattr(module, name, deadly)
main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["weights", "manifest", "renaming"])
def test_kill_during_a_save(data, whole, tmp_path, where):
    """kill -9 while the second checkpoint is written: the next call resumes from the first one, exactly."""
    out = tmp_path / "run"
    arguments = ["train", str(data / "config.yaml"), f"out={out}"]
    killed = subprocess.run([sys.executable, "-c", KILLED_DURING_THE_SECOND_SAVE, where, *arguments])
    assert killed.returncode == -signal.SIGKILL
    assert sorted(os.listdir(out / "checkpoints")) == [".step-00000006.tmp", "step-00000003"]
    train(data, out)
    assert sorted(os.listdir(out / "checkpoints")) == ["step-00000006", "step-00000008"]
    assert rows(out) == rows(whole)
    assert same_weights(out / "model", whole / "model")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1])
def test_two_ranks_equal_one_process(data, tmp_path, stage):
    """The same global batches give the same losses; both ranks stop, resume and finish together."""
    settings = ["model.num_hidden_layers=2", "log.images_every=0"]
    single, both = tmp_path / "single", tmp_path / "both"
    train(data, single, *settings)
    command = ["-m", "open_unitok", "train", str(data / "config.yaml"), f"out={both}", *settings]
    for stop in (["stop_at=4"], []):
        launch(*command, f"engine.zero_stage={stage}", *stop)
    assert [row["step"] for row in rows(both)] == list(range(1, 9))
    for one, two in zip(rows(single), rows(both)):
        for name in ("loss", "l1", "l2", "vq", "entropy", "clip"):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), (one["step"], name)
    models = [UniTok.from_pretrained(out / "model") for out in (single, both)]
    torch.testing.assert_close(*[m.decoder.norm.weight for m in models], rtol=1e-3, atol=1e-4)
    # another number of ranks or ZeRO stage is the same run
    again = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert again.returncode == 0 and "is finished" in again.stdout
