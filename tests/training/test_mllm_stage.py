"""The MLLM stage: one batch is overfitted, a resumed run equals an uninterrupted one, accumulation, packing
and ranks do not change the losses, fine-tuning goes on from pretraining, and mistakes are named."""

import argparse
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from open_unitok.errors import UserError
from open_unitok.mllm import UniTokForConditionalGeneration, UniTokProcessor
from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.training import extract, run
from open_unitok.training.mllm_config import LossOptions
from open_unitok.training.mllm_stage import join

COLOURS = ("red", "blue", "brown", "black")
THINGS = ("cat", "dog", "fox", "sky")


def write_codes(folder: Path, name: str, numbers: range, captions: int) -> str:
    """Pictures by number as a tar, and that as a code folder; returns its path."""
    with tarfile.open(folder / f"{name}.tar", "w") as tar:
        for number in numbers:
            colour, thing = COLOURS[number % 4], THINGS[number // 4]
            pixels = np.random.default_rng(number).integers(0, 256, (2, 2, 3), dtype=np.uint8)
            png = io.BytesIO()
            Image.fromarray(pixels).resize((32, 32)).save(png, "PNG")
            turns = [
                {"from": "human", "value": "<image>\nWhat is in this photo"},
                {"from": "gpt", "value": f"a {colour} {thing}"},
            ]
            texts = [f"a {colour} {thing}", f"A photo of a {colour} {thing}"][:captions]
            info = {"captions": texts, "conversations": [turns]}
            for ending, data in (("png", png.getvalue()), ("json", json.dumps(info).encode())):
                member = tarfile.TarInfo(f"{number:04d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    parser = argparse.ArgumentParser()
    extract.add_arguments(parser)
    given = ["--tokenizer", folder / "unitok", "--data", folder / f"{name}.tar", "--out", folder / name]
    extract.run(parser.parse_args(list(map(str, given))))
    return str(folder / name)


def write_tokenizer(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    sizes = {"stem_width": 8, "stage_widths": (8, 16), "stage_depths": (1, 1), "hidden_size": 32}
    decoder = {"decoder_widths": (16, 8), "decoder_depths": (1, 1), "num_attention_heads": 2}
    codes = {"num_codebooks": 3, "codebook_size": 16, "codebook_dim": 4, "num_hidden_layers": 1}
    text = {"text_hidden_size": 16, "text_num_layers": 1, "text_num_heads": 2, "text_vocab_size": 20}
    UniTok(UniTokConfig(image_size=32, embed_dim=8, **sizes, **decoder, **codes, **text)).save_pretrained(
        folder
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory, golden):
    """A folder with a tiny visual tokenizer, code shards of sixteen pictures and of four, and plain text."""
    folder = tmp_path_factory.mktemp("stage")
    write_tokenizer(folder / "unitok", seed=0)
    path = write_codes(folder, "codes", range(16), captions=2)
    write_codes(folder, "few", range(4), captions=1)
    (folder / "text.txt").write_text("The quick brown fox\nin the blue sky\nA photo of a dog\n")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {
        "stage": "mllm",
        "out": str(folder / "unnamed"),
        "steps": 6,
        "batch_size": 8,
        "data": {
            "mixture": [
                {"kind": "drawing", "path": path, "weight": 0.5},
                {"kind": "captioning", "path": path, "weight": 0.2},
                {"kind": "conversation", "path": path, "weight": 0.2},
                {"kind": "text", "path": str(folder / "text.txt"), "weight": 0.1},
            ],
            "max_length": 100,
        },
        "model": {
            "unitok": str(folder / "unitok"),
            "text_tokenizer": str(golden / "mllm" / "tokenizer.model"),
            "text": {**sizes, "max_position_embeddings": 128},
            "depth": {"num_hidden_layers": 1},
            "processor": {"template": "plain"},
        },
        "optimizer": {"lr": 3e-3, "eps": 1e-8, "clip_grad": 1.0},
        "engine": {"threads": 1},
        "checkpoint": {"every": 100},
        "log": {"every": 1},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def train(place: Path, out: str, *overrides: str) -> Path:
    """`unitok train` in this process; returns the run's folder."""
    folder = place / out
    given = [f"out={folder}", *overrides]
    run.run(argparse.Namespace(config=str(place / "config.yaml"), overrides=given))
    return folder


def rows(folder: Path) -> list[dict]:
    """The log without what depends on the clock."""
    timed = ("seconds", "samples_per_second", "tokens_per_second", "memory_gib")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def reference(place):
    """Six steps in one go."""
    return train(place, "reference")


def same_rows(one: list[dict], other: list[dict], tolerance: float) -> None:
    for a, b in zip(one, other, strict=True):
        for name in ("loss", "text_loss", "image_loss", "grad_norm", "text_loss/drawing", "accuracy/0"):
            assert a[name] == pytest.approx(b[name], rel=tolerance), (name, a["step"])


def test_one_batch_is_overfitted(place):
    few = f"[{{kind: drawing, path: {place}/few}}, {{kind: conversation, path: {place}/few}}]"
    folder = train(
        place,
        "overfit",
        "steps=160",
        "log.every=40",
        f"data.mixture={few}",
        "data.unconditional=0",
        "optimizer.lr=1e-2",
    )
    first, *_, last = rows(folder)
    assert first["text_loss"] > 0.5 and first["image_loss"] > 0.5
    assert last["text_loss"] < 0.02 and last["image_loss"] < 0.02
    assert all(last[f"accuracy/{book}"] == 1 for book in range(3))
    assert last["text_loss/drawing"] < 0.02 and last["text_loss/conversation"] < 0.02


def test_resumed_equals_uninterrupted(place, reference):
    folder = train(place, "resumed", "stop_at=2")
    assert not (folder / "model").exists()
    train(place, "resumed", "stop_at=3")
    train(place, "resumed")
    assert rows(folder) == rows(reference)
    one, other = weights(folder), weights(reference)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "overrides",
    [
        ["engine.accumulation=4"],
        ["data.pack_to=100"],
        ["data.workers=2"],
        ["engine.accumulation=2", "data.group_by_length=true"],
    ],
)
def test_cut_in_another_way_the_losses_are_the_same(place, reference, overrides):
    folder = train(place, "-".join(o.replace(".", "_") for o in overrides), *overrides)
    same_rows(rows(folder), rows(reference), 1e-4)


def test_the_model_folder_has_all_that_inference_needs(place, reference):
    folder = reference / "model"
    model = UniTokForConditionalGeneration.from_pretrained(folder)
    processor = UniTokProcessor.from_pretrained(folder)
    unitok = UniTok.from_pretrained(folder / "unitok")
    assert model.config.unitok_fingerprint == unitok.fingerprint()
    assert processor.template == "plain" and processor.num_image_tokens == unitok.config.num_visual_tokens
    assert torch.equal(model.visual_embedder.codebooks, unitok.quantizer.codebooks)
    facts = json.loads((reference / "run.json").read_text())["facts"]
    assert facts["tokenizer"] == unitok.fingerprint()
    checkpoint = UniTokForConditionalGeneration.from_pretrained(reference / "checkpoints" / "step-00000006")
    assert torch.equal(checkpoint.lm_head.weight, model.lm_head.weight)


def test_fine_tuning_goes_on_from_a_model_with_parts_frozen(place, reference):
    folder = train(
        place,
        "tuned",
        "model=null",
        f"start_from={reference}/model",
        "lr_factors={depth_head: 0, lm_head: 0.5}",
    )
    before, after = weights(reference), weights(folder)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith("depth_head.") for name in changed)
    assert "visual_embedder.codebooks" not in changed
    assert {"lm_head.weight", "visual_embedder.projector.1.weight"} <= changed
    assert (folder / "model" / "unitok" / "config.json").exists()


def test_a_trained_decoder_is_taken_over(place):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=500, max_position_embeddings=128, **sizes)
    )  # 512 ids are used
    base.save_pretrained(place / "decoder")
    folder = train(
        place, "taken", "model.text={}", f"model.language_model={place}/decoder", "steps=1", "optimizer.lr=0"
    )
    model = UniTokForConditionalGeneration.from_pretrained(folder / "model")
    assert (
        len(model.get_input_embeddings().weight)
        >= UniTokProcessor.from_pretrained(folder / "model").vocab_size
    )
    for own, other in (
        (model.language_model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight),
        (model.lm_head.weight[:490], base.lm_head.weight),
        (model.get_input_embeddings().weight[:490], base.model.embed_tokens.weight),
    ):
        assert torch.equal(own, other[: len(own)])


def test_the_published_weighting_counts_every_code_as_one_token():
    text, image, targets = torch.tensor(6.0), torch.tensor(8.0), torch.tensor([3, 16])
    published = join(text, image, targets, LossOptions())
    ce, codes = 6.0 / 3, 8.0 / 16
    assert published.loss.item() == pytest.approx(codes * 16 / 19 + ce * 3 / 19)
    assert (published.text_loss.item(), published.image_loss.item()) == (ce, codes)
    means = join(text, image, targets, LossOptions(weighting="means", text=0.5, image=2.0))
    assert means.loss.item() == pytest.approx(0.5 * ce + 2 * codes)
    assert join(text * 0, image, torch.tensor([0, 16]), LossOptions()).loss.item() == pytest.approx(codes)
    assert join(text, image * 0, torch.tensor([3, 0]), LossOptions(text=0.5)).loss.item() == pytest.approx(ce)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["model=null"], "Give either `model`"),
        (["start_from=somewhere"], "Give either `model`"),
        (["model=null", "start_from=/nowhere"], "/nowhere does not exist"),
        (["model.text.hiden_size=8"], "hidden_size"),
        (["model.text.model_type=lama"], "no decoder"),
        (["model.fields.visual_contex=full"], "visual_context"),
        (["model.processor.templat=plain"], "template"),
        (["model.processor.template=vicuna"], "vicuna_v1"),
        (["lr_factors={head: 1}"], "no such part"),
        (["data.mixture.0.kind=draw"], "drawing"),
        (["data.max_length=500"], "context is 128"),
        (["batch_size=7", "engine.accumulation=2"], "batch_size 7"),
        (["loss={text: 0, image: 0}"], "not both 0"),
    ],
)
def test_mistakes_are_named(place, overrides, message):
    with pytest.raises(UserError, match=message):
        train(place, f"mistake-{message[:9]}", *overrides)
    assert not (place / f"mistake-{message[:9]}" / "model").exists()


def test_other_folders_are_refused(place, reference, tmp_path):
    with pytest.raises(UserError, match="not an MLLM"):
        train(place, "wrong-a", "model=null", f"start_from={place}/unitok")
    with pytest.raises(UserError, match="not a visual tokenizer"):
        train(place, "wrong-b", f"model.unitok={reference}/model")
    write_tokenizer(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="another visual tokenizer"):
        train(place, "wrong-c", f"model.unitok={tmp_path}/other")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_two_ranks_equal_one(place, reference, stage):
    folder = place / f"ranks-{stage}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    more = ["engine.accumulation=2", f"engine.zero_stage={stage}", f"out={folder}"]
    target = ["-m", "open_unitok", "train", str(place / "config.yaml"), *more]
    subprocess.run([*command, *target], check=True, timeout=280)
    same_rows(rows(folder), rows(reference), 1e-4)
    one, other = weights(folder), weights(reference)
    assert one.keys() == other.keys()
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-3
