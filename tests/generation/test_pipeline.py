"""The Pipeline: batches, seeds, streaming, answers, reconstruction, errors."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.generation import Pipeline, Sampling

PROMPTS = ["a red circle", "two blue squares on white", "a star"]
SAMPLING = Sampling(guidance=2.0)


def same(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


def test_images_do_not_depend_on_the_batch(pipe):
    images = pipe.generate(PROMPTS, SAMPLING, seed=5)
    assert [image.size for image in images] == [(48, 48)] * 3
    split = pipe.generate(PROMPTS, SAMPLING, seed=5, batch_size=2)
    assert all(map(same, images, split))
    assert same(images[2], pipe.generate(PROMPTS[2:], SAMPLING, seed=[7])[0])
    assert not same(images[2], pipe.generate(PROMPTS[2:], SAMPLING, seed=8)[0])
    assert pipe.generate([]) == []


def test_a_stream_ends_with_the_same_images(pipe):
    steps = list(pipe.stream(PROMPTS, SAMPLING, seed=5))
    assert len(steps) == 3  # rows of visual tokens
    assert all(map(same, steps[-1], pipe.generate(PROMPTS, SAMPLING, seed=5)))
    for rows, images in enumerate(steps[:-1], 1):
        for image in images:
            below = np.asarray(image)[16 * rows :]
            assert image.size == (48, 48) and (below == 128).all()
            assert (np.asarray(image)[: 16 * rows] != 128).any()


def test_several_images_of_a_prompt_and_negative_prompts(pipe):
    two = pipe.generate_codes(PROMPTS[:2], SAMPLING, seed=5, num_images=2)
    repeated = [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert torch.equal(two, pipe.generate_codes(repeated, SAMPLING, seed=5, batch_size=3))
    negative = ["blurred", "a dog"]
    guided = pipe.generate_codes(PROMPTS[:2], SAMPLING, seed=5, num_images=2, negative_prompt=negative)
    alone = pipe.generate_codes(PROMPTS[1:2], SAMPLING, seed=7, num_images=2, negative_prompt="a dog")
    assert torch.equal(guided[2:], alone) and not torch.equal(guided, two)


def test_first_rows_are_the_prefix_of_a_generated_image(pipe, photos):
    prefix = pipe.first_rows(photos[:2], 2)
    assert prefix.shape == (2, 6, 3)
    codes = pipe.generate_codes(PROMPTS[:2], SAMPLING, prefix=prefix, batch_size=1)
    assert torch.equal(codes[:, :6], prefix)
    steps = list(pipe.stream(PROMPTS[:2], SAMPLING, prefix=prefix))
    assert len(steps) == 1 and all(map(same, steps[0], pipe.decode(codes)))
    with pytest.raises(UserError, match="rows is 3; it must be a whole number from 1 to 2"):
        pipe.first_rows(photos[:1], 3)


def test_a_closed_stream_stops_generating(pipe, monkeypatch):
    steps = pipe.stream(PROMPTS[:1], SAMPLING)
    next(steps)
    monkeypatch.setattr(pipe.model.visual_embedder, "embed", None)  # any further step would fail
    steps.close()
    assert list(steps) == []


def test_answers_are_streamed_in_pieces(pipe, photos):
    questions = ["What is it?", "Is it red?"]
    images = [photos[0], None]
    pieces = list(pipe.answer_stream(images, questions, max_new_tokens=12))
    assert len(pieces) > 2 and all(len(p) == 2 for p in pieces)
    assert ["".join(column) for column in zip(*pieces)] == pipe.answer(images, questions, max_new_tokens=12)


def test_a_chat_fills_the_context_at_most(pipe, photos):
    """The context is 64: the default length is the rest of it; an explicit larger length is rejected."""
    prompt = len(pipe.processor.question_ids("And now?", 1, history=()))
    answer = pipe.chat("And now?", photos[0])
    assert answer == pipe.chat("And now?", photos[0], max_new_tokens=64 - prompt)
    streams = [pipe.chat_stream("And now?", photos[0], (), n) for n in (None, 64 - prompt)]
    assert list(streams[0]) == list(streams[1])
    with pytest.raises(UserError, match="more than the context of 64"):
        pipe.chat("And now?", photos[0], max_new_tokens=65 - prompt)
    with pytest.raises(UserError, match="context of 64"):
        pipe.chat("And now? " * 40, photos[0])


def test_a_chat_is_one_long_prompt(pipe, photos):
    history = [("What is it?", "A star."), ("Is it red?", "Yes.")]
    prompt_text = (
        "<image>\nWhat is it? ASSISTANT: A star.</s>USER: Is it red? ASSISTANT: Yes.</s>USER: And now?"
    )
    answer = pipe.chat("And now?", photos[0], history, max_new_tokens=6)
    assert answer == pipe.answer([photos[0]], [prompt_text], max_new_tokens=6)[0]
    assert "".join(pipe.chat_stream("And now?", photos[0], history, max_new_tokens=6)) == answer
    several = pipe.answer([photos[0], None], ["And now?", "Hi"], max_new_tokens=6, histories=[history, []])
    assert several == [answer, pipe.chat("Hi", max_new_tokens=6)]
    second = [("What is it?", "A star."), ("And <image> this?", "Two.")]
    marked = pipe.processor.question_ids("Which?", 1, history=second)
    assert marked.index(pipe.processor.image_token_id) > 10


def test_answers_do_not_depend_on_the_batch(pipe, photos):
    questions = ["What is it?", "How many stars are there in the image?", "Is it red?", "And without?"]
    images = [photos[0], Image.open(photos[1]), [photos[0], photos[2].read_bytes()], None]
    answers = pipe.answer(images, questions, max_new_tokens=6)
    assert len(answers) == 4 and all(isinstance(answer, str) for answer in answers)
    for image, question, answer in zip(images, questions, answers):
        assert pipe.answer([image], [question], max_new_tokens=6) == [answer]
    assert pipe.answer([], []) == []


def test_a_repeated_image_is_encoded_once(pipe, photos, monkeypatch):
    seen = []
    encode = pipe.encode_for_reading
    monkeypatch.setattr(pipe, "encode_for_reading", lambda p, **k: seen.append(len(p)) or encode(p, **k))
    pipe.answer([photos[0]] * 3, ["a?", "b?", "c?"], max_new_tokens=1)
    assert seen == [1]


def test_reconstruction_is_encode_and_decode(pipe, photos):
    reconstructions = pipe.reconstruct(photos, batch_size=2)
    assert [image.size for image in reconstructions] == [(48, 48)] * 3
    assert same(reconstructions[2], pipe.reconstruct(photos[2:])[0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: p.generate("a fox"), "list of prompts"),
        (lambda p: p.generate(["a", " "]), "Prompt 1 is ' '"),
        (lambda p: p.generate([3]), "Prompt 0 is 3"),
        (lambda p: p.generate(3), "Expected a list of prompts, got 3"),
        (lambda p: p.generate(["a\udcff"]), r"Prompt 0 is 'a\\udcff'"),
        (lambda p: p.generate(["word " * 60]), "shorten the prompt"),
        (lambda p: p.generate(["a"], seed=[1, 2]), "2 seeds for 1 images"),
        (lambda p: p.generate(["a"], seed=1.5), "seed is 1.5"),
        (lambda p: p.generate(["a"], batch_size=0), "batch_size is 0"),
        (lambda p: p.generate(["a"], num_images=0), "num_images is 0"),
        (lambda p: p.generate(["a"], negative_prompt=["b", "c"]), "2 negative prompts for 1 prompts"),
        (lambda p: p.generate(["a"], negative_prompt=" "), "Negative prompt 0"),
        (lambda p: p.generate(["a"], negative_prompt=3), "Expected a list of negative prompts, got 3"),
        (lambda p: p.generate(["a"], prefix=[[1]]), "a tensor of .1 or 1 images"),
        (lambda p: p.generate(["a"], prefix=3), "a tensor of .1 or 1 images"),
        (lambda p: p.generate(["a"], prefix=torch.tensor(3)), "a tensor of .1 or 1 images"),
        (lambda p: p.stream([" "]), "Prompt 0 is ' '"),
        (lambda p: p.stream(["a"], prefix=torch.zeros(1, 9, 3, dtype=torch.long)), "prefix has shape"),
        (lambda p: p.answer_stream([None], ["word " * 60]), "context"),
        (lambda p: p.chat(" "), "Question 0"),
        (lambda p: p.chat("a?", history=[("b",)]), "Entry 0 of a history"),
        (lambda p: p.chat("a?", history="b"), "Entry 0 of a history"),
        (lambda p: p.chat("a?", history=[("a\udcff", "b")]), "Entry 0 of a history"),
        (lambda p: p.answer([None], ["a?"], histories=[]), "0 histories for 1 questions"),
        (lambda p: p.chat_stream("a?", None, [], 4, temperature=0), "temperature is 0"),
        (lambda p: p.answer([None], ["a?", "b?"]), "1 images for 2 questions"),
        (lambda p: p.answer([None], [""]), "Question 0 is ''"),
        (lambda p: p.answer([None], None), "Expected a list of questions, got None"),
        (lambda p: p.answer(None, ["a?"]), "images is None"),
        (lambda p: p.answer([3], ["a?"]), "Cannot read int as an image"),
        (lambda p: p.answer(["x" * 300], ["a?"]), "is not an existing file"),
        (lambda p: p.answer([None], ["word " * 60]), "context"),
        (lambda p: p.answer(["nothing.png"], ["a?"]), "nothing.png"),
        (lambda p: p.answer([b"not an image"], ["a?"]), "not a readable image"),
        (lambda p: p.reconstruct(["nothing.png"]), "nothing.png"),
        (lambda p: p.reconstruct(["nothing.png"], batch_size=-1), "batch_size is -1"),
    ],
)
def test_invalid_requests_are_rejected(pipe, call, words):
    with pytest.raises(UserError, match=words):
        call(pipe)


def test_folders_of_other_models_are_rejected(folder, tmp_path):
    def rejects(path, words):
        with pytest.raises(UserError, match=words):
            Pipeline.from_pretrained(path)

    rejects(tmp_path / "missing", "does not exist")
    rejects(tmp_path, "no config.json")
    rejects(folder / "unitok", "visual tokenizer")
    rejects(folder / "config.json", "is a file")
    (tmp_path / "run").mkdir()
    shutil.copytree(folder, tmp_path / "run" / "model")
    rejects(tmp_path / "run", "Did you mean .*model")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    rejects(tmp_path / "other", "bert")
    shutil.rmtree(tmp_path / "run" / "model" / "unitok")
    rejects(tmp_path / "run" / "model", "no visual tokenizer")


def test_another_tokenizer_is_rejected(folder, tiny_unitok, tmp_path):
    shutil.copytree(folder, tmp_path / "mllm")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "mllm" / "config.json").write_text(json.dumps({**config, "unitok_fingerprint": "0" * 64}))
    with pytest.raises(UserError, match="replace it with the tokenizer of training"):
        Pipeline.from_pretrained(tmp_path / "mllm")


@pytest.mark.parametrize(
    ("device", "dtype", "words"),
    [
        ("tpu9", None, "device is 'tpu9'"),
        (None, None, "device is None"),
        ("cuda:77", None, "does not have"),
        ("cpu", "int8", "dtype is 'int8'"),
    ],
)
def test_unknown_devices_and_dtypes_are_rejected(folder, device, dtype, words):
    with pytest.raises(UserError, match=words):
        Pipeline.from_pretrained(folder, device, dtype)


def test_unknown_quantization_is_rejected(folder):
    with pytest.raises(UserError, match="quantization is 'int4'; it must be None or 'int8'"):
        Pipeline.from_pretrained(folder, quantization="int4")


def test_bfloat16_generates_and_answers(folder, photos):
    pipe = Pipeline.from_pretrained(folder, dtype="bfloat16")
    assert pipe.generate(PROMPTS[:1], SAMPLING)[0].size == (48, 48)
    assert len(pipe.answer([photos[0]], ["What?"], max_new_tokens=2)) == 1
