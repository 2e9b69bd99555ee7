"""The records of LLaVA-1.5's two data sets, as released: conversion, code folders and sequences."""

import json

import numpy as np
import pytest
from PIL import Image

from open_unitok.cli.main import run
from open_unitok.mllm import UniTokProcessor
from open_unitok.training.data.code_shards import CodeFolder
from open_unitok.training.data.sample_kinds import SAMPLE_KINDS, DropOptions, crop_mismatch
from open_unitok.training.data.sequences import IGNORE_INDEX, SequenceBuilder

# blip_laion_cc_sbu_558k.json: one round, the mark before or behind the instruction
PRETRAIN = [
    {
        "id": "004539375",
        "image": "00453/004539375.jpg",
        "conversations": [
            {"from": "human", "value": "Render a clear and concise summary of the photo.\n<image>"},
            {"from": "gpt", "value": "select luxury furniture"},
        ],
    },
    {
        "id": "002239345",
        "image": "00223/002239345.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWrite a terse but informative summary of the picture."},
            {"from": "gpt", "value": "a grey watch with an army style strap"},
        ],
    },
]
# llava_v1_5_mix665k.json: several rounds; texts alone (ShareGPT), some of which begin with an answer; ids may
# be numbers, images are named by data set
FINETUNE = [
    {
        "id": "000000033471",
        "image": "coco/train2017/000000033471.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat are the colors of the bus?"},
            {"from": "gpt", "value": "The bus is white and red."},
            {"from": "human", "value": "Is it driving?"},
            {"from": "gpt", "value": "Yes."},
        ],
    },
    {
        "id": 1741,
        "image": "vg/VG_100K_2/2.jpg",
        "conversations": [
            {"from": "human", "value": "What is it?\n<image>"},
            {"from": "gpt", "value": "A tree."},
        ],
    },
    {
        "id": "wgByO4Y_0",
        "model": "",
        "conversations": [
            {"from": "gpt", "value": "Left over from before."},
            {"from": "human", "value": "How do I sort a list?"},
            {"from": "gpt", "value": "Call sorted."},
        ],
    },
    {
        "id": "ocr_vqa_1",
        "image": "ocr_vqa/images/0802.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWho wrote this?"},
            {"from": "gpt", "value": "It cannot be downloaded any more."},
        ],
    },
]


@pytest.fixture(scope="module")
def extracted(mllm, tmp_path_factory):
    """(name, records, mode) -> the code folder of a release of these records."""
    root = tmp_path_factory.mktemp("llava")

    def make(name, records, mode):
        folder = root / name
        for number, record in enumerate(records):
            if "image" in record and "ocr_vqa" not in record["image"]:
                path = folder / "images" / record["image"]
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.random.default_rng(number).integers(0, 256, (2, 5, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((80, 32)).save(path)
        (folder / "release.json").write_text(json.dumps(records))
        convert = ["data", "convert", "llava", folder / "release.json", folder / "tars"]
        run(list(map(str, [*convert, "--images", folder / "images", "--max-bad-share", "0.5"])))
        given = ["--tokenizer", mllm.folder / "unitok", "--data", f"{folder}/tars/*.tar", "--mode", mode]
        run(list(map(str, ["extract-codes", *given, "--out", folder / "codes"])))
        return CodeFolder(folder / "codes")

    return make


def sequences(codes, kind, processor):
    """The decoded targets of every sample, and how many placeholders it has."""
    builder = SequenceBuilder(processor, 400)
    for number in range(codes.sizes[0]):
        sample = codes.read(0, number)
        chosen = SAMPLE_KINDS[kind].select(sample, DropOptions(), (0.0, 0.0, 0.0))
        built = builder.build(kind, chosen.text, tuple(len(sample.images[i]) for i in chosen.images))
        learned = built.labels[built.labels != IGNORE_INDEX]
        places = np.flatnonzero(built.ids == processor.image_token_id)
        yield processor.text_tokenizer.decode(learned), places, built.ids


@pytest.fixture(scope="module")
def processor(golden):
    path = golden / "mllm" / "tokenizer.model"
    return UniTokProcessor.from_text_tokenizer(path, image_size=32, num_image_tokens=4, reading="llava")


def test_captions_for_the_projector(extracted, processor):
    codes = extracted("pretrain", PRETRAIN, "crop")
    found = list(sequences(codes, "alignment", processor))
    assert [text.strip() for text, _, _ in found] == [r["conversations"][1]["value"] for r in PRETRAIN]
    # bos, the image, the caption: the instruction is not part of it
    assert all(places.tolist() == [1, 2, 3, 4] for _, places, _ in found)
    assert crop_mismatch(codes, "alignment", processor.style) is None


def test_instructions(extracted, processor, capsys):
    codes = extracted("finetune", FINETUNE, "pad_grey")
    assert "ocr_vqa/images/0802.jpg: there is no such file" in capsys.readouterr().err
    assert codes.manifest["samples"] == 3 and codes.manifest["images"] == 2
    assert crop_mismatch(codes, "conversation", processor.style) is None
    assert crop_mismatch(codes, "conversation") is None
    bus, tree, text = sequences(codes, "conversation", processor)
    assert "The bus is white and red." in bus[0] and "Yes." in bus[0]
    assert "colors" not in bus[0] and len(bus[1]) == 4
    # the image stands before the question in both
    opening = processor.encode_text(
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions. USER: "
    )
    assert bus[1][0] == tree[1][0] == len(opening)
    assert len(text[1]) == 0 and "Call sorted." in text[0] and "Left over" not in text[0]
