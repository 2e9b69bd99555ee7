"""Fixtures: a small tokenizer, labelled images as plain and as ten-crop codes, and tiny runs."""

import argparse
import contextlib
import io
import json
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from open_unitok.cli import extract_codes
from open_unitok.cli import train as train_command
from open_unitok.tokenizer import UniTok, UniTokConfig

SIZE, CLASSES = 32, 3
TOKENIZER = {
    "image_size": SIZE, "num_codebooks": 3, "codebook_size": 16, "codebook_dim": 4, "stem_width": 8,
    "stage_widths": (8, 8), "stage_depths": (1, 1), "hidden_size": 16, "decoder_widths": (8, 8),
    "decoder_depths": (1, 1), "num_attention_heads": 2, "num_hidden_layers": 1, "text_hidden_size": 16,
    "text_num_layers": 1, "text_num_heads": 2, "text_vocab_size": 20, "embed_dim": 8,
}  # fmt: skip
MODEL = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "depth_layers": 1, "dropout": 0.0, "initializer_range": 0.2,
}  # fmt: skip


def write_images(path, count, member="json", label=lambda number: number % CLASSES, side=40, **more):
    """A tar of random images; the class is in KEY.json, with `more` keys, or KEY.cls."""
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            png = io.BytesIO()
            pixels = np.random.default_rng(number).integers(0, 256, (side, side + 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(png, "PNG")
            text = str(label(number)) if member == "cls" else json.dumps({"label": label(number), **more})
            for ending, data in (("png", png.getvalue()), (member, text.encode())):
                info = tarfile.TarInfo(f"{number:05d}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def extract(*words):
    """Run `unitok extract-codes`."""
    parser = argparse.ArgumentParser()
    extract_codes.add_arguments(parser)
    with contextlib.redirect_stdout(io.StringIO()):
        extract_codes.run(parser.parse_args([str(word) for word in words]))


@pytest.fixture(scope="session")
def classes(tmp_path_factory):
    """folder (unitok/, images.tar, codes/, crops/, config.yaml), train(name, *overrides), rows, weights."""
    folder = tmp_path_factory.mktemp("classes")
    torch.manual_seed(0)
    UniTok(UniTokConfig(**TOKENIZER)).save_pretrained(folder / "unitok")
    write_images(folder / "images.tar", 24)
    shared = ("--tokenizer", folder / "unitok", "--data", folder / "images.tar", "--device", "cpu")
    extract(*shared, "--out", folder / "codes")
    extract(*shared, "--out", folder / "crops", "--ten-crop")
    config = {
        "stage": "mllm", "conditioner": "class", "out": str(folder / "run"), "steps": 6, "batch_size": 8,
        "data": {"mixture": [{"kind": "class_conditional", "path": str(folder / "codes")}]},
        "model": {"unitok": str(folder / "unitok"), "num_classes": CLASSES, "fields": MODEL},
        "optimizer": {"lr": 1.0e-3}, "engine": {"threads": 1}, "checkpoint": {"every": 2},
        "log": {"every": 1},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))

    def train(name, *overrides):
        words = [f"out={folder / name}", *overrides]
        train_command.run(argparse.Namespace(config=str(folder / "config.yaml"), overrides=words))
        return folder / name

    def rows(run):
        clock = ("time", "tokens_per_second", "tflops_per_second", "seconds", "samples_per_second")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if not any(c in k for c in clock)} for row in lines]

    return SimpleNamespace(
        folder=folder, train=train, rows=rows, weights=lambda run: load_file(run / "model/model.safetensors")
    )


@pytest.fixture(scope="session")
def reference(classes):
    """A finished run."""
    return classes.train("reference")
