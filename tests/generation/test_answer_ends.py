"""Answers of the shipped model hold no U+0000: boi, eoi and pad end an answer on every path."""

import pytest
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.generation import Pipeline

# the shipped model begins its answers to these with the id of U+0000 (or goes on with it)
QUESTIONS = ["\ufeffWhat color?", "été", "🙂", "x" * 50, "draw a red circle"]


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.from_pretrained("scenes", device="cpu")


def holds_control_characters(text: str) -> bool:
    return any(ord(letter) < 9 for letter in text)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_no_answer_holds_a_control_character(backend):
    pipe = Pipeline.from_pretrained("scenes", device="cpu", backend=backend)
    images = [None, Image.new("RGB", (64, 64), "white")] * len(QUESTIONS)
    questions = [question for question in QUESTIONS for _ in range(2)]
    plain = pipe.answer(images, questions, max_new_tokens=8)
    pieces = pipe.answer_stream(images, questions, max_new_tokens=8)
    assert ["".join(texts) for texts in zip(*pieces, strict=True)] == plain
    answers = [*plain, *pipe.answer(images, questions, max_new_tokens=8, num_beams=2)]
    answers += pipe.answer(images, questions, max_new_tokens=8, seed=1, do_sample=True, temperature=2.0)
    assert not any(map(holds_control_characters, answers))
    assert any(plain)  # other answers are as before


def test_ids_that_are_no_text(pipe):
    processor = pipe.processor
    assert {2, processor.boi_token_id, processor.eoi_token_id, 0} == processor.end_token_ids()
    assert processor.decode([3, 4, 3, 261, 2]) == "a"


@pytest.mark.parametrize("text", ["What is \x00 this?", "\x01"])
def test_a_text_cannot_hold_the_marks_of_images(pipe, text):
    for ids in (pipe.processor.question_ids, pipe.processor.text_to_image_ids, pipe.processor.encode_text):
        with pytest.raises(UserError, match="marks images in this model: remove it"):
            ids(text)
