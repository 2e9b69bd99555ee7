"""One's own images and words by commands alone: convert, text tokenizer, both stages, generate and ask."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image
from sentencepiece import SentencePieceProcessor

from open_unitok.cli.main import main
from open_unitok.core.errors import UserError
from open_unitok.core.files import model_path
from open_unitok.mllm import UniTokProcessor
from open_unitok.tokenizer.caption_tokenizer import CaptionTokenizer
from open_unitok.training.core.text_tokenizer import train_text_tokenizer
from open_unitok.training.run import load_run_config
from open_unitok.training.tokenizer.model import build_model, load_caption_tokenizer

TOKENIZER = {
    "image_size": 32,
    "stem_width": 8,
    "stage_widths": [8, 8],
    "stage_depths": [1, 1],
    "decoder_widths": [8, 8],
    "decoder_depths": [1, 1],
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_codebooks": 2,
    "codebook_size": 16,
    "codebook_dim": 4,
    "embed_dim": 16,
    "text_hidden_size": 16,
    "text_num_layers": 1,
    "text_num_heads": 2,
    "text_context_length": 24,
}
COMMON = {"engine": {"threads": 1}, "steps": 2, "batch_size": 4, "log": {"every": 1}}


def unitok(*arguments) -> None:
    main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder with tars of eight images with captions, and words.model."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "images").mkdir()
    for i, colour in enumerate(["crimson", "teal", "ochre", "mauve"] * 2):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        (folder / "images" / f"{i}.txt").write_text(f"\ufeffein {colour} Fenster\r\nwindow {i}, 窓\r\n")
    unitok("data", "convert", "folder", folder / "images", folder / "tars", "--captions", "first")
    unitok("data", "text-tokenizer", folder / "tars", "--out", folder / "words.model", "--vocab-size", "400")
    return folder


def write_yaml(path, **config) -> str:
    path.write_text(yaml.safe_dump(config, allow_unicode=True))
    return str(path)


def test_the_ids_are_those_of_llama(own):
    pieces = SentencePieceProcessor(model_file=str(own / "words.model"))
    assert [pieces.id_to_piece(i) for i in range(5)] == ["<unk>", "<s>", "</s>", "<0x00>", "<0x01>"]
    assert pieces.pad_id() == -1 and pieces.get_piece_size() <= 400
    # the words of the captions are few ids; a small data set leaves less room for those of the prompts
    assert len(pieces.encode("in crimson Fenster")) <= 9
    assert len(pieces.encode("USER:")) < 5 and len(pieces.encode("ASSISTANT:")) < 10
    assert pieces.decode(pieces.encode("猫 ñ")) == "猫 ñ"
    processor = UniTokProcessor.from_text_tokenizer(own / "words.model")
    ids = (processor.pad_token_id, processor.bos_token_id, processor.eos_token_id)
    assert ids == (0, 1, 2) and (processor.boi_token_id, processor.eoi_token_id) == (3, 4)


def test_both_stages_by_commands_alone(own, capsys):
    sources = {"sources": [{"path": str(own / "tars" / "*.tar")}], "shuffle": 8}
    first = write_yaml(
        own / "first.yaml",
        **COMMON,
        stage="tokenizer",
        out=str(own / "first"),
        data=sources,
        model=TOKENIZER,
        caption_tokenizer=str(own / "words.model"),
        losses={"lpips": 0.0},
    )
    unitok("train", first)
    model = own / "first" / "model"
    assert CaptionTokenizer.from_model_folder(model).vocab_size > 260
    unitok("extract-codes", "--tokenizer", model, "--data", own / "tars" / "*.tar", "--out", own / "codes")
    decoder = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    second = write_yaml(
        own / "second.yaml",
        **COMMON,
        stage="mllm",
        out=str(own / "second"),
        data={"mixture": [{"kind": "text_to_image", "path": str(own / "codes")}], "max_length": 128},
        model={
            "unitok": str(model),
            "text_tokenizer": str(own / "words.model"),
            "processor": {"template": "plain"},
            "text": {**decoder, "max_position_embeddings": 256},
            "depth": {"num_hidden_layers": 1},
        },
    )
    unitok("train", second)
    model = own / "second" / "model"
    capsys.readouterr()
    unitok("generate", "in crimson Fenster", "--model", model, "--out", own / "out", "--device", "cpu")
    unitok("ask", own / "images" / "0.png", "Was ist das?", "--model", model, "--max-new-tokens", "4")
    assert len(list((own / "out").glob("*.png"))) >= 1
    assert "\x00" not in capsys.readouterr().out


def test_texts_of_every_kind_of_data_set(own, tmp_path):
    talk = [{"from": "human", "value": "<image>\nWelche Farbe?"}, {"from": "gpt", "value": "zinnoberrot"}]
    (tmp_path / "talks.json").write_text(json.dumps([{"image": "a.png", "conversations": talk}] * 40))
    (tmp_path / "texts.txt").write_bytes(b"\xef\xbb\xbf" + b"Schaffhausen\r\n" * 40)
    (tmp_path / "texts.jsonl").write_text('{"text": "Appenzell"}\n{"broken"\n' * 40)
    files = [tmp_path / name for name in ("talks.json", "texts.txt", "texts.jsonl")]
    unitok("data", "text-tokenizer", *files, own / "tars", "--out", tmp_path / "out", "--vocab-size", "500")
    pieces = SentencePieceProcessor(model_file=str(tmp_path / "out" / "tokenizer.model"))
    for word in ("zinnoberrot", "Schaffhausen", "Appenzell", "Fenster"):
        assert len(pieces.encode(word)) == 1


def test_errors(own, tmp_path):
    with pytest.raises(UserError, match="Vocabulary size is smaller than required"):
        train_text_tokenizer(["some words"], 100)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        unitok("data", "text-tokenizer", tmp_path / "empty", "--out", tmp_path / "x.model")
    with pytest.raises(SystemExit):
        unitok("data", "text-tokenizer", tmp_path / "no.txt", "--out", tmp_path / "x.model")


@pytest.mark.parametrize("name", [None, "scenes", "FOLDER", "own"])
def test_the_shipped_tokenizer_trains_on_own_captions(own, tmp_path, capsys, name):
    """With its own caption tokenizer the text tower stays; with other ids it starts anew."""
    captions = {"FOLDER": str(model_path("scenes") / "unitok"), "own": str(own / "words.model")}.get(
        name, name
    )
    path = write_yaml(
        tmp_path / "a.yaml",
        **COMMON,
        stage="tokenizer",
        out=str(tmp_path / "run"),
        init_from="scenes",
        data={"sources": [{"path": str(own / "tars" / "*.tar")}]},
        losses={"lpips": 0.0, "clip": 0.1},
        caption_tokenizer=captions,
    )
    config = load_run_config(path, [])
    tokenizer = load_caption_tokenizer(config)
    model = build_model(config, tokenizer)
    anew = "starts anew" in capsys.readouterr().out
    assert anew == (name == "own")
    assert tokenizer.context_length == model.config.text_context_length == 64
    assert model.config.text_vocab_size >= tokenizer.vocab_size
    assert model.embed_text(tokenizer(["ein Fenster"])).shape == (1, model.config.embed_dim)
    if name == "own":
        with pytest.raises(UserError, match="freeze holds text_encoder"):
            build_model(load_run_config(path, ["freeze=[text_encoder]"]), tokenizer)
    if name is None:
        unitok("train", path)
        assert (tmp_path / "run" / "model" / "caption_tokenizer" / "tokenizer.model").exists()
