"""Fixtures: golden losses with their small DINOv2, discriminator and LPIPS, data of a small run of stage 1,
and tiny MLLM runs."""

import argparse
import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel

from open_unitok.cli import extract_codes
from open_unitok.cli import train as train_command
from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.tokenizer.frozen.dinov2 import DINOv2
from open_unitok.tokenizer.frozen.lpips import LPIPS
from open_unitok.training.tokenizer.discriminator import DinoDiscriminator

SEED = 20250
COLOURS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 200), "black": (20, 20, 20)}

YAML = """
stage: tokenizer
engine: {{threads: 1}}
out: {folder}/run
steps: 8
batch_size: 8
data: {{sources: [{{path: "{folder}/pairs-*.tar"}}], shuffle: 16}}
images: {{captions: json}}
caption_tokenizer: {folder}/tokenizer.model
model:
  {{image_size: 32, stem_width: 8, stage_widths: [8, 8], stage_depths: [1, 1], decoder_widths: [8, 8],
   decoder_depths: [1, 1], hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, num_codebooks: 2,
   codebook_size: 16, codebook_dim: 4, embed_dim: 16, text_hidden_size: 16, text_num_layers: 1,
   text_num_heads: 2, text_context_length: 12, drop_path_rate: 0.1}}
losses: {{lpips: 0.0, entropy: 0.1}}
codebooks: {{init_images: 16, reset_after: 2, reset_share: 1.0}}
ema: 0.9
optimizer: {{lr: 2.0e-3}}
schedule: {{warmup: 2}}
checkpoint: {{every: 3}}
log: {{every: 1, images_every: 4}}
"""


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Two tars of 20 coloured squares with captions, a sentencepiece model, and config.yaml."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    captions = []
    for tar in range(2):
        with tarfile.open(folder / f"pairs-{tar}.tar", "w") as file:
            for n in range(20):
                name = list(COLOURS)[rng.integers(4)]
                image = np.full((32, 32, 3), 235, np.uint8)
                x, y = rng.integers(0, 20, 2)
                image[y : y + 12, x : x + 12] = COLOURS[name]
                buffer = io.BytesIO()
                Image.fromarray(image).save(buffer, "PNG")
                words = [f"a {name} square", f"{name} and square"]
                captions += words
                for extension, content in (
                    ("png", buffer.getvalue()),
                    ("json", json.dumps({"captions": words}).encode()),
                ):
                    member = tarfile.TarInfo(f"{tar}{n:03d}.{extension}")
                    member.size = len(content)
                    file.addfile(member, io.BytesIO(content))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=290,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "config.yaml").write_text(YAML.format(folder=folder))
    return folder


@pytest.fixture(scope="session")
def values(golden):
    """The golden tensors; clone before changing one."""
    return load_file(golden / "losses" / "losses.outputs.safetensors")


@pytest.fixture(scope="session")
def numbers(golden):
    """The golden numbers."""
    return json.loads((golden / "losses" / "losses.meta.json").read_text())


@pytest.fixture
def small_dino(formula):
    """() -> a fresh DINOv2 of the golden files: 98 pixels natively, width 64, 4 blocks."""

    def build() -> DINOv2:
        dino = DINOv2(width=64, depth=4, heads=2, patch=14, grid=7)
        dino.load_state_dict({n: formula(f"dino.{n}", t.shape, SEED) for n, t in dino.state_dict().items()})
        return dino

    return build


@pytest.fixture
def small_discriminator(small_dino, formula):
    """(**options) -> a fresh discriminator of the golden files."""

    def build(**options) -> DinoDiscriminator:
        model = DinoDiscriminator(small_dino(), depths=(0, 1, 3), **options)
        if not options:
            heads = {
                n: formula(f"disc.heads.{n}", t.shape, SEED) for n, t in model.heads.state_dict().items()
            }
            model.heads.load_state_dict(heads)
        return model

    return build


@pytest.fixture(scope="session")
def lpips(formula):
    """LPIPS with the golden weights."""
    model = LPIPS()
    model.load_state_dict({n: formula(f"lpips.{n}", t.shape, SEED) for n, t in model.state_dict().items()})
    return model


@pytest.fixture
def recorded_noise(values):
    """(step, number) -> the noise of that call of DiffAugment in the golden training steps."""

    def pick(step: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        return values[f"train.step{step}.rand{2 * number}"], values[f"train.step{step}.rand{2 * number + 1}"]

    return pick


@pytest.fixture(scope="session")
def dino_file(tmp_path_factory):
    """A small DINOv2 with random weights under the published name."""
    torch.manual_seed(0)
    dino = DINOv2(width=64, depth=12, heads=1, patch=14, grid=2)
    for name, parameter in dino.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1 if "embed" in name or "token" in name else 0.12)
    path = tmp_path_factory.mktemp("dino") / "dinov2_vits14_pretrain.pth"
    torch.save(dino.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A tiny random CLIP of 32 pixels with its preprocessor's mean and deviation, as a teacher."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    vision = sizes | {"num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
    text = sizes | {"num_hidden_layers": 1, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=12)).save_pretrained(folder)
    normal = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.25, 0.25, 0.25)}
    normal["image_processor_type"] = "CLIPImageProcessor"
    (folder / "preprocessor_config.json").write_text(json.dumps(normal))
    return folder


# ---- the MLLM stage: a tiny visual tokenizer, codes of sixteen images, and `train` -----------------------

NAMES = ("red", "blue", "brown", "black")
THINGS = ("cat", "dog", "fox", "sky")


def write_codes(folder: Path, name: str, numbers: range, captions: int, *options: str) -> str:
    """Write random images by number as a tar and extract their codes; returns the code folder's path.

    `options` are further ones of extract-codes.
    """
    with tarfile.open(folder / f"{name}.tar", "w") as tar:
        for number in numbers:
            colour, thing = NAMES[number % 4], THINGS[number // 4]
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
    extract_codes.add_arguments(parser)
    given = [
        "--tokenizer",
        folder / "unitok",
        "--data",
        folder / f"{name}.tar",
        "--out",
        folder / name,
        *options,
    ]
    extract_codes.run(parser.parse_args(list(map(str, given))))
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


@pytest.fixture(scope="session")
def mllm_folder(tmp_path_factory, golden):
    """A folder with a tiny visual tokenizer, code shards of sixteen images and of four, and plain text."""
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
                {"kind": "text_to_image", "path": path, "weight": 0.5},
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


def train(root: Path, out: str, *overrides: str) -> Path:
    """Run `unitok train` in this process; returns the run directory."""
    folder = root / out
    given = [f"out={folder}", *overrides]
    train_command.run(argparse.Namespace(config=str(root / "config.yaml"), overrides=given))
    return folder


def rows(folder: Path) -> list[dict]:
    """The records of metrics.jsonl without times and speeds."""
    timed = ("seconds", "samples_per_second", "tokens_per_second", "tflops_per_second")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def same_rows(one: list[dict], other: list[dict], tolerance: float) -> None:
    for a, b in zip(one, other, strict=True):
        for name in ("loss", "text_loss", "image_loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=tolerance), (name, a["step"])


@pytest.fixture(scope="session")
def mllm(mllm_folder):
    """folder, train(out, *overrides) -> run directory, rows(folder), weights(folder), write_tokenizer,
    write_codes, same_rows; `train` runs `unitok train folder/config.yaml` in this process."""
    return SimpleNamespace(
        folder=mllm_folder,
        train=lambda out, *overrides: train(mllm_folder, out, *overrides),
        rows=rows,
        weights=weights,
        same_rows=same_rows,
        write_tokenizer=write_tokenizer,
        write_codes=write_codes,
    )


@pytest.fixture(scope="session")
def mllm_reference(mllm):
    """An uninterrupted run of six steps."""
    return mllm.train("reference")
