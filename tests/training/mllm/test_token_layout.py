"""A tokenizer with 2 x 8 visual tokens, as many as 4 x 4: extraction and one training step."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from open_unitok.cli.main import run
from open_unitok.core.errors import UserError
from open_unitok.mllm import UniTokForConditionalGeneration, UniTokProcessor
from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.tokenizer.images import load_image, to_pixels
from open_unitok.tokenizer.token_layout import TokenLayout
from open_unitok.training.data.code_shards import CodeFolder
from open_unitok.training.data.mixture import codes_layout

SIZES = {
    "stem_width": 8,
    "stage_widths": (8, 16),
    "stage_depths": (1, 1),
    "hidden_size": 32,
    "decoder_widths": (16, 8),
    "decoder_depths": (1, 1),
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "text_hidden_size": 16,
    "text_num_layers": 1,
    "text_num_heads": 2,
    "text_vocab_size": 20,
    "num_codebooks": 3,
    "codebook_size": 16,
    "codebook_dim": 4,
    "embed_dim": 8,
}
WIDE = {"rows": 2, "columns": 8, "registers": 0}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A folder with `unitok` (2 x 8 tokens), `square` (its weights, 4 x 4), images and the codes of both."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    unitok = UniTok(UniTokConfig(image_size=128, token_layout=WIDE, **SIZES)).eval()
    unitok.save_pretrained(folder / "unitok")
    square = UniTok(UniTokConfig(image_size=64, **SIZES))
    square.load_state_dict(unitok.state_dict())
    square.save_pretrained(folder / "square")
    (folder / "images").mkdir()
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (2, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((256, 64)).save(folder / "images" / f"{number}.png")
        (folder / "images" / f"{number}.txt").write_text(f"a cat {number}")
    run(["data", "convert", "folder", str(folder / "images"), str(folder / "tars")])
    for name, codes in (("unitok", "codes"), ("square", "square_codes")):
        given = ["--tokenizer", str(folder / name), "--data", f"{folder}/tars/*.tar"]
        run(["extract-codes", *given, "--out", str(folder / codes)])
    return folder


def test_extraction_keeps_the_layout(wide):
    codes = CodeFolder(wide / "codes")
    assert codes.manifest["layout"] == WIDE and codes.shape == (16, 3)
    assert codes.manifest["oblong"] == 0  # 64 x 256 pixels have the aspect ratio of 2 x 8 tokens
    assert codes_layout(codes) == TokenLayout(2, 8)
    unitok = UniTok.from_pretrained(wide / "unitok").eval()
    pixels = to_pixels(load_image(wide / "images" / "3.png"), (32, 128))
    assert codes.read(0, 3).codes.tolist() == unitok.encode(pixels[None])[0].tolist()
    square = CodeFolder(wide / "square_codes")
    assert codes_layout(square) == TokenLayout(4, 4) and square.manifest["oblong"] == 8
    assert square.manifest["tokenizer"] == codes.manifest["tokenizer"]


def train(mllm, wide, codes, name):
    entries = f"[{{kind: text_to_image, path: {wide}/{codes}}}, {{kind: captioning, path: {wide}/{codes}}}]"
    return mllm.train(name, f"data.mixture={entries}", f"model.unitok={wide}/unitok", "steps=1")


def test_one_training_step(mllm, wide):
    folder = train(mllm, wide, "codes", "wide")
    (row,) = mllm.rows(folder)
    assert row["image_loss"] > 0 and row["text_loss"] > 0
    config = UniTokForConditionalGeneration.from_pretrained(folder / "model").config
    assert config.num_image_tokens == 16 and config.token_layout == WIDE
    processor = UniTokProcessor.from_pretrained(folder / "model")
    assert processor.pixels(wide / "images" / "0.png").shape == (3, 32, 128)


def test_codes_of_another_layout_are_rejected(mllm, wide):
    with pytest.raises(UserError, match="4 x 4 visual tokens, but the model generates 2 x 8"):
        train(mllm, wide, "square_codes", "other-layout")


def test_an_extraction_resumes_only_in_its_own_layout(wide, tmp_path):
    shutil.copytree(wide / "codes", tmp_path / "codes")
    given = ["--tokenizer", str(wide / "square"), "--data", f"{wide}/tars/*.tar"]
    with pytest.raises(UserError, match=r"another extraction \(layout"):
        run(["extract-codes", *given, "--out", str(tmp_path / "codes")])


@pytest.mark.parametrize(
    ("stored", "layout"),
    [
        ({"grid": [2, 8]}, (2, 8, 0)),
        ({"grid": [3, 5]}, (3, 5, 1)),
        ({}, (4, 4, 0)),
        ({"layout": WIDE}, (2, 8, 0)),
    ],
)
def test_layouts_of_older_code_folders(wide, tmp_path, stored, layout):
    shutil.copytree(wide / "codes", tmp_path / "codes")
    manifest = json.loads((tmp_path / "codes" / "codes.json").read_text())
    del manifest["layout"]
    (tmp_path / "codes" / "codes.json").write_text(json.dumps({**manifest, **stored}))
    assert codes_layout(CodeFolder(tmp_path / "codes")) == TokenLayout(*layout)
