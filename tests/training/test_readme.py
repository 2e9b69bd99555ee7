"""The data preparation commands of training/README.md run as written, and its mixture trains."""

import gzip
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from open_unitok.cli.main import run
from open_unitok.mllm import UniTokProcessor
from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.training.core.config import build_config
from open_unitok.training.data.mixture import Mixture
from open_unitok.training.data.mixture_options import MixtureOptions
from open_unitok.training.data.sample_kinds import SAMPLE_KINDS
from open_unitok.training.data.sequences import SequenceBuilder

README = Path(__file__).resolve().parent.parent.parent / "training" / "README.md"


def section():
    """The text from "Preparing data" up to the next section."""
    return re.split(r"^## ", README.read_text(encoding="utf-8"), flags=re.M)[1:][0]


def blocks(language=""):
    """The texts of all fenced blocks of a language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", section(), flags=re.M | re.S)
    return [text for found, text in fenced if found == language]


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A working directory with the files that the commands name: images, texts, and a tiny tokenizer."""
    torch.manual_seed(0)
    sizes = {"stem_width": 8, "stage_widths": (8, 16), "stage_depths": (1, 1), "hidden_size": 32}
    decoder = {"decoder_widths": (16, 8), "decoder_depths": (1, 1), "num_attention_heads": 2}
    codes = {"num_codebooks": 3, "codebook_size": 16, "codebook_dim": 4, "num_hidden_layers": 1}
    text = {"text_hidden_size": 16, "text_num_layers": 1, "text_num_heads": 2, "text_vocab_size": 20}
    unitok = UniTok(UniTokConfig(image_size=32, embed_dim=8, **sizes, **decoder, **codes, **text))
    unitok.save_pretrained(tmp_path / "runs" / "demo" / "tokenizer" / "model")
    for name in ("my_images/a.jpg", "my_images/b.png", "llava/images/coco/1.jpg", "docs/images/a.jpg",
                 "imagenet/train/n01/a.jpg", "imagenet/train/n02/a.jpg"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 32), (len(name) * 9, 50, 9)).save(tmp_path / name)
    (tmp_path / "my_images" / "a.txt").write_text("a cat\na red cat\n")
    (tmp_path / "pairs.csv").write_text("file_name,text\na.jpg,a cat\n")
    talks = [json.loads(text) for text in blocks("json")]
    (tmp_path / "llava" / "conversations.json").write_text(json.dumps(talks))
    obelics = {"texts": ["A cat.", None], "images": [None, "a.jpg"]}
    mmc4 = {"text_list": ["A cat."], "image_info": [{"image_name": "a.jpg", "matched_text_index": 0}]}
    (tmp_path / "docs" / "obelics.jsonl").write_text(json.dumps(obelics) + "\n")
    (tmp_path / "docs" / "mmc4.jsonl").write_text(json.dumps(mmc4) + "\n")
    (tmp_path / "text" / "c4").mkdir(parents=True)
    (tmp_path / "text" / "c4" / "1.json.gz").write_bytes(gzip.compress(b'{"text": "a cat"}\n'))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_data_preparation_runs_as_written(workdir, golden):
    lines = "".join(blocks()).replace("\\\n", " ").splitlines()
    assert len(lines) > 12
    for line in lines:
        words = shlex.split(line)
        if words[0] == "zcat":
            subprocess.run(line, shell=True, check=True)
        else:
            assert words[0] in ("unitok", "torchrun")
            run(words[words.index("open_unitok") + 1 :] if words[0] == "torchrun" else words[1:])
    (line,) = re.findall(r"`unitok (data convert folder pairs[^`]*)`", section())
    run(shlex.split(line))
    (shown,) = blocks("yaml")
    options = build_config(MixtureOptions, yaml.safe_load(shown)["data"])
    path = golden / "mllm" / "tokenizer.model"
    processor = UniTokProcessor.from_text_tokenizer(path, num_image_tokens=4, template="plain")
    sequences = SequenceBuilder(processor, 400)
    fingerprint = UniTok.from_pretrained("runs/demo/tokenizer/model").fingerprint()
    (batch,) = Mixture(options, sequences, seed=0, batch_size=40, fingerprint=fingerprint).next()
    kinds = {list(SAMPLE_KINDS)[kind] for kind in batch.kinds.unique().tolist()}
    assert kinds == {"text_to_image", "captioning", "conversation", "document", "text"}


def test_the_defaults_shown_are_the_published_ones():
    (shown,) = blocks("yaml")
    given, entry = yaml.safe_load(shown)["data"], {"kind": "text", "path": "x.txt"}
    default = build_config(MixtureOptions, {"mixture": [entry]})
    for name in ("text_to_image_share", "unconditional", "short_captions", "max_length"):
        assert given[name] == getattr(default, name)
