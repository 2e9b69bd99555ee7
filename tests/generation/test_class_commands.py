"""Class-conditional models on the command line: generate, convert there and back, commands that need text."""

import argparse
from pathlib import Path

import pytest
import torch
from PIL import Image

from open_unitok.cli.main import main
from open_unitok.core.errors import UserError
from open_unitok.generation import Pipeline
from open_unitok.generation.image_files import read_record
from open_unitok.mllm.class_conditional import ClassConditionalConfig, ClassConditionalModel
from open_unitok.mllm.class_conditional.convert import to_llamagen
from open_unitok.tokenizer import UniTok, UniTokConfig

TOKENIZER = {
    "image_size": 32, "num_codebooks": 3, "codebook_size": 16, "codebook_dim": 4, "stem_width": 8,
    "stage_widths": (8, 8), "stage_depths": (1, 1), "hidden_size": 16, "decoder_widths": (8, 8),
    "decoder_depths": (1, 1), "num_attention_heads": 2, "num_hidden_layers": 1, "text_hidden_size": 16,
    "text_num_layers": 1, "text_num_heads": 2, "text_vocab_size": 20, "embed_dim": 8,
}  # fmt: skip


GRAPHIC = str(Path(__file__).parents[2] / "docs" / "scenes.png")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """unitok/, a checkpoint as LlamaGen's training saves it, and model/ that is converted from it."""
    root = tmp_path_factory.mktemp("c2i")
    torch.manual_seed(0)
    unitok = UniTok(UniTokConfig(**TOKENIZER))
    unitok.save_pretrained(root / "unitok")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ClassConditionalConfig.for_tokenizer(unitok.config, num_classes=4, depth_layers=1, **sizes)
    model = ClassConditionalModel(config)
    torch.nn.init.normal_(model.depth_head.output.weight)
    saved = {"model": to_llamagen(model), "steps": 7, "args": argparse.Namespace(lr=1e-4)}
    torch.save(saved, root / "c2i.pt")
    words = ["--unitok", str(root / "unitok"), "--heads", "2"]
    main(["convert", "class-conditional", str(root / "c2i.pt"), str(root / "model"), *words])
    return root


def test_a_converted_checkpoint_generates_and_converts_back(files):
    pipe = Pipeline.from_pretrained(files / "model")
    assert pipe.model.config.null_class == 4 and pipe.model.config.unitok_fingerprint
    assert len(pipe.generate(classes=[0, 3], seed=1)) == 2
    assert len(list(pipe.stream(classes=[2]))) == 2  # a preview after each row
    main(["convert", "class-conditional", str(files / "model"), str(files / "back.pt")])
    one = torch.load(files / "back.pt")["model"]
    with torch.serialization.safe_globals([argparse.Namespace]):
        other = torch.load(files / "c2i.pt")["model"]
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_generate_by_class(files, tmp_path, capsys):
    words = ["generate", "--class", "0", "3", "--model", str(files / "model"), "--num-images", "2"]
    main([*words, "--out", str(tmp_path), "--seed", "5", "--guidance", "1.5"])
    names = sorted(path.name for path in tmp_path.glob("0*.png"))
    assert names == [
        "00000-class-0-seed5.png", "00000-class-0-seed6.png",
        "00001-class-3-seed7.png", "00001-class-3-seed8.png",
    ]  # fmt: skip
    record = read_record(tmp_path / names[2])
    assert record["class"] == 3 and record["seed"] == 7 and record["guidance"] == 1.5
    assert "prompt" not in record and "guidance_interval" not in record
    assert Image.open(tmp_path / "grid.png").size[0] >= 64
    main([*words, "--out", str(tmp_path), "--seed", "5", "--guidance", "1.5"])
    assert "0 images generated" in capsys.readouterr().err


@pytest.mark.parametrize("words, message", [
    (["generate", "--class", "4"], "class 4 is not valid: expected 0 to 3"),
    (["generate", "a cat"], "reads neither text nor images"),
    (["generate", "a cat", "--class", "1"], "--class takes the place of prompts"),
    (["generate"], "--class ID"),
    (["generate", "--class", "1", "--backend", "native"], "does not run class-conditional models"),
    (["generate", "--class", "1", "--adapter", "x"], "adapter is 'x'"),
    (["generate", "--class", "1", "--quantization", "int8"], "quantization is 'int8'"),
    (["ask", GRAPHIC, "who?"], "is a class-conditional model, which reads no text"),
    (["chat"], "is a class-conditional model, which reads no text"),
])  # fmt: skip
def test_errors_are_one_line(files, tmp_path, capsys, words, message):
    out = ["--out", str(tmp_path / "out")] if words[0] == "generate" else []
    with pytest.raises(SystemExit):
        main([*words, "--model", str(files / "model"), *out])
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1, err


def test_conversion_refuses_other_files_in_one_line(files, tmp_path, capsys):
    source, target = str(files / "c2i.pt"), str(tmp_path / "t")
    other = {**TOKENIZER, "num_codebooks": 2}
    UniTok(UniTokConfig(**other)).save_pretrained(tmp_path / "other")
    for words, message in (
        ([source, target], "give --heads"),
        ([source, target, "--heads", "2", "--classes", "9"], "has 5 classes"),
        ([source, target, "--heads", "2", "--unitok", str(tmp_path / "other")], "num_codebooks = 3"),
        ([str(files / "unitok"), target], "not a class-conditional model"),
        ([str(files / "model"), target], "must end in .pt"),
        ([str(tmp_path / "none.pt"), target], "is not an existing file"),
    ):
        with pytest.raises(SystemExit):
            main(["convert", "class-conditional", *words])
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1, err
    main(["convert", "class-conditional", source, target, "--heads", "2", "--grid", "2"])
    assert "no visual tokenizer" in capsys.readouterr().out
    with pytest.raises(UserError, match="has no visual tokenizer"):
        Pipeline.from_pretrained(target)


def test_a_prompt_model_refuses_classes():
    with pytest.raises(UserError, match="classes are for class-conditional models"):
        Pipeline.from_pretrained("scenes").generate(classes=[0])
