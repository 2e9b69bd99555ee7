"""LLaVA's way of preparing images and the text around them, beside UniTok's."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.mllm import UniTokProcessor
from open_unitok.mllm.config import IGNORED
from open_unitok.mllm.prompts import put_images_first
from open_unitok.tokenizer.images import to_pixels


@pytest.fixture(scope="module")
def processors(golden, tmp_path_factory):
    """style -> a processor of 16 tokens per image that was saved and loaded."""
    found = {}
    for style in ("unitok", "llava"):
        folder = tmp_path_factory.mktemp(style)
        model = golden / "mllm" / "tokenizer.model"
        made = UniTokProcessor.from_text_tokenizer(model, image_size=64, num_image_tokens=16, reading=style)
        made.save_pretrained(folder)
        stored = json.loads((folder / "processor_config.json").read_text())
        assert stored.get("reading") == (None if style == "unitok" else style)
        found[style] = UniTokProcessor.from_pretrained(folder)
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What is it?\n<image>", "<image>\nWhat is it?"),
        ("<image>\nWhat is it?", "<image>\nWhat is it?"),
        ("<image>", "<image>"),
        ("  <image> Why <image>?", "<image>\n<image>\nWhy ?"),
        ("no image ", "no image "),
    ],
)
def test_images_move_to_the_beginning(text, expected):
    assert put_images_first(text) == expected


@pytest.mark.parametrize("size", [(90, 40), (31, 77), (50, 50)])
def test_images_are_padded_with_grey(processors, size):
    """The image in the middle of a grey square, scaled by a bicubic filter."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    side = max(size)
    square = Image.new("RGB", (side, side), (127, 127, 127))
    square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    expected = np.asarray(square.resize((64, 64), Image.Resampling.BICUBIC), dtype=np.float32)
    found = processors["llava"].pixels(image)
    torch.testing.assert_close(found, torch.from_numpy(expected / 127.5 - 1).permute(2, 0, 1))
    assert torch.equal(found, to_pixels(image, 64, mode="pad_grey"))
    assert torch.equal(found, processors["unitok"].pixels(image)) is False


def test_a_question_reads_the_same_wherever_its_image_stands(processors):
    ids = [processors["llava"].question_ids(q) for q in ("<image>\nIs it?", "Is it?\n<image>", "Is it?")]
    assert ids[0] == ids[1] == ids[2]
    assert processors["unitok"].question_ids("Is it?\n<image>") != ids[0]


def test_conversations(processors):
    """As LLaVA's training code: images of a question first, the rest as in the published template."""

    def turns(question):
        return [
            {"from": "human", "value": question},
            {"from": "gpt", "value": "a cat"},
            {"from": "human", "value": "And here?"},
            {"from": "gpt", "value": "a dog"},
        ]

    llava, unitok = processors["llava"], processors["unitok"]
    moved = llava.conversation_ids(turns("What is it?\n<image>"))
    assert moved == unitok.conversation_ids(turns("<image>\nWhat is it?"))
    assert any(label != IGNORED for label in moved[1])
    text = turns("What is it?")
    assert llava.conversation_ids(text) == unitok.conversation_ids(text)


def test_projector_pretraining_ends_with_a_line(processors):
    turns = [{"from": "human", "value": "Describe.\n<image>"}, {"from": "gpt", "value": "a red car"}]
    for style, end in (("llava", "\n"), ("unitok", " ")):
        processor = processors[style]
        ids, labels = processor.alignment_ids(turns)
        target = processor.encode_text("a red car" + end)[1:]
        assert ids == [processor.bos_token_id, processor.image_token_id, *target]
        assert labels == [IGNORED, IGNORED, *target]


def test_unknown_styles_are_named(golden):
    with pytest.raises(UserError, match=r"reading = 'lava'\. Did you mean 'llava'"):
        UniTokProcessor.from_text_tokenizer(golden / "mllm" / "tokenizer.model", reading="lava")
