"""Streamed text, on the page and from the server: pieces are final and add up to the whole text."""

import random

import pytest

from open_unitok.generation.serving.worker import AnswerTask, IncrementalDetokenizer
from open_unitok.generation.text_generation import stream_text

A, B, NO_CHARACTER = 68, 69, 258  # LLaMA's byte pieces <0x41>, <0x42>, <0xFF>
NI = (231, 192, 163)  # the three bytes of one Chinese character
END, IMAGE, UNKNOWN = 2, -200, 10**6  # skipped by decoding: they do not end a run of bytes
ANSWERS = {
    "an invalid byte changes the whole run": [270, A, B, NO_CHARACTER, 271],
    "an invalid byte at the end": [270, 271, A, NO_CHARACTER],
    "a character byte by byte": [270, *NI, *NI, 271],
    "half a character at the end": [270, *NI, *NI[:2]],
    "skipped ids do not end a run": [270, A, END, IMAGE, UNKNOWN, NO_CHARACTER, 271],
    "only bytes": [A, B],
    "empty": [],
}
ANSWERS |= {f"random {i}": random.Random(i).choices(range(400), k=40) for i in range(20)}


def on_the_page(processor, ids):
    return ["".join(pieces) for pieces in stream_text(processor, iter([[i] for i in ids]), 1)]


def from_the_server(processor, ids):
    detokenizer = IncrementalDetokenizer(processor, AnswerTask([1], [], 1000))
    pieces = [detokenizer.add(token) for token in [*ids, None]]
    assert detokenizer.completion().text == "".join(pieces)
    return pieces


@pytest.mark.parametrize("stream", [on_the_page, from_the_server])
@pytest.mark.parametrize("name", ANSWERS)
def test_the_pieces_add_up_to_the_text(pipe, stream, name):
    ids = ANSWERS[name]
    assert "".join(stream(pipe.processor, ids)) == pipe.processor.decode(ids).strip()


def test_text_is_not_held_back_longer_than_necessary(pipe):
    pieces = on_the_page(pipe.processor, [270, A, 271, 272])
    assert [bool(piece) for piece in pieces] == [True, False, True, True]


def test_chat_stream_equals_chat(pipe, photos):
    for question in ("What?", "And now?", "a b c", "Where is it?"):
        for image in photos[:2]:
            whole = pipe.chat(question, image)
            assert "".join(pipe.chat_stream(question, image)) == whole
