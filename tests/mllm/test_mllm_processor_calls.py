"""Processor and model as transformers calls them: chat messages, pipelines, Auto classes, other processes."""

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature, pipeline

from open_unitok import Pipeline
from open_unitok.core.errors import UserError
from open_unitok.core.files import SHIPPED_MODELS
from open_unitok.mllm import UniTokForConditionalGeneration, UniTokProcessor

FOLDER = SHIPPED_MODELS / "scenes"
QUESTIONS = ["What color is the circle?", "How many stars are there?"]
CHAT = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.from_pretrained("scenes", device="cpu")


@pytest.fixture(scope="module")
def images(pipe):
    return pipe.generate(["a red circle", "three blue stars"], seed=1)


@pytest.fixture(scope="module")
def answers(pipe, images):
    found = pipe.answer(images, QUESTIONS, max_new_tokens=4)
    assert found == ["red", "3"]
    return found


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32)


def message(image, text):
    return [{"role": "user", "content": [{"type": "image", **image}, {"type": "text", "text": text}]}]


def test_chat_messages_give_the_answers_of_the_pipeline(pipe, model, processor, images, answers):
    assert type(model) is UniTokForConditionalGeneration and type(processor) is UniTokProcessor
    chats = [message({"image": image}, question) for image, question in zip(images, QUESTIONS)]
    inputs = processor.apply_chat_template(chats, **CHAT, return_tensors="pt")
    assert isinstance(inputs, BatchFeature) and inputs["image_codes"].shape == (2, 16, 8)
    assert inputs["input_ids"][0].tolist() == pipe.processor.question_ids(QUESTIONS[0])
    new = model.generate(**inputs, max_new_tokens=4)
    assert processor.batch_decode(new, skip_special_tokens=True) == answers
    assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape


def test_a_call_takes_a_prompt_and_its_images(pipe, model, processor, images, answers):
    prompt = processor.apply_chat_template(message({}, QUESTIONS[0]), add_generation_prompt=True)
    assert prompt == "USER: <image>\nWhat color is the circle? ASSISTANT:"
    inputs = processor(text=prompt, images=images[0])
    assert processor.batch_decode(model.generate(**inputs, max_new_tokens=4)) == answers[:1]
    for other in (
        processor(text=[prompt], images=[[images[0]]]),
        processor(images[0], prompt),
        processor(prompt, images[0]),
    ):
        assert torch.equal(other["input_ids"], inputs["input_ids"])
    first = processor(text="What?", images=images)
    assert (first["input_ids"] == -200).sum() == 32 and len(first["image_codes"]) == 2
    two = processor(text=["<image> a <image>", "no image"], images=images)
    assert (two["input_ids"] == -200).sum(1).tolist() == [32, 0] and two["attention_mask"][1, 0] == 0
    assert "image_codes" not in processor(text="no image")
    padded = processor(text="a", padding="max_length", max_length=9, padding_side="right")
    assert padded["attention_mask"].sum() < 9 == padded["input_ids"].shape[1]


def test_images_of_messages_come_as_files_bytes_or_base64(processor, images, tmp_path):
    buffer = io.BytesIO()
    images[0].save(buffer, "png")
    images[0].save(tmp_path / "a.png")
    text = base64.b64encode(buffer.getvalue()).decode()
    url = {"url": f"data:image/png;base64,{text}"}
    expected = processor.encode_images([images[0]])
    files = [{"path": str(tmp_path / "a.png")}, {"url": f"file://{tmp_path}/a.png"}]
    contents = [{"base64": text}, {"image": buffer.getvalue()}, {"type": "image_url", "image_url": url}]
    for entry in (*files, url, *contents):
        inputs = processor.apply_chat_template(message(entry, "What?"), **CHAT)
        assert torch.equal(inputs["image_codes"], expected)
    upside_down = images[0].rotate(180)
    exif = Image.Exif()
    exif[0x0112] = 3
    upside_down.save(tmp_path / "turned.png", exif=exif)
    turned = processor.apply_chat_template(message({"path": tmp_path / "turned.png"}, "What?"), **CHAT)
    assert torch.equal(turned["image_codes"], expected)


def test_conversations(pipe, processor, images):
    chat = [
        *message({"image": images[0]}, "What color?"),
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        {"role": "user", "content": "And the shape?"},
    ]
    ids = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
    history = [("<image>\nWhat color?", "red")]
    assert ids[0].tolist() == pipe.processor.question_ids("And the shape?", 1, history=history)
    text = processor.apply_chat_template(chat[:2], continue_final_message=True)
    assert text.endswith("ASSISTANT: red")
    assert processor.apply_chat_template(chat[:2]).endswith("ASSISTANT: red</s>")
    assert processor.apply_chat_template([{"role": "system", "content": "Be short."}, *chat]).startswith(
        "Be short. USER"
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p, i: p(text="a <image>", images=[i, i]), "marks 1 images"),
        (lambda p, i: p(text=["a", "b", "c"], images=[i, i]), "2 were given"),
        (lambda p, i: p(images=i), "needs text"),
        (lambda p, i: p(text=3), "text must be a string"),
        (lambda p, i: p(text="a", videos=[i]), "no option 'videos'"),
        (lambda p, i: p(text="a", images="gone.png"), "gone.png is not an existing file"),
        (lambda p, i: p(text="a", images=i, truncation=True, max_length=5), "would cut an image"),
        (lambda p, i: p.apply_chat_template([{"role": "robot", "content": "a"}]), "role 'robot'"),
        (lambda p, i: p.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}]), "a part"),
        (lambda p, i: p.apply_chat_template([{"role": "user", "content": 3}]), "content 3"),
        (lambda p, i: p.apply_chat_template([]), "no message"),
    ],
)
def test_wrong_calls_end_in_one_line(processor, images, call, words):
    with pytest.raises(UserError, match=words):
        call(processor, images[0])


def test_a_processor_without_a_visual_tokenizer(processor, images, tmp_path):
    alone = UniTokProcessor(processor.text_tokenizer, 64, 16, "plain")
    assert alone(text="a")["input_ids"].shape[0] == 1
    with pytest.raises(UserError, match=r"no visual tokenizer"):
        alone(text="a", images=images[0])
    processor.save_pretrained(tmp_path)
    assert UniTokProcessor.from_pretrained(tmp_path).unitok is not None


def test_pipeline_of_transformers(model, processor, images, answers, tmp_path):
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    chats = [message({"image": image}, question) for image, question in zip(images, QUESTIONS)]
    found = ask(text=chats, max_new_tokens=4, return_full_text=False)
    assert [entry[0]["generated_text"] for entry in found] == answers
    images[0].save(tmp_path / "a.png")
    prompt = processor.apply_chat_template(chats[0], add_generation_prompt=True)
    found = ask(images=str(tmp_path / "a.png"), text=prompt, max_new_tokens=4, return_full_text=False)
    assert found[0]["generated_text"] == answers[0]


OTHER_PROCESS = """
import sys
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
assert not any(name.startswith("open_unitok") for name in sys.modules)
folder = sys.argv[1]
unitok = AutoModel.from_pretrained(folder + "/unitok", trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained(folder + "/again")
print(type(unitok).__name__, type(processor).__name__, type(model).__name__)
"""


def test_a_standalone_folder_loads_in_a_process_without_the_import(model, processor, tmp_path):
    """Without `standalone`, a process must import open_unitok first, as README says."""
    model.save_pretrained(tmp_path / "model", standalone=True)
    processor.save_pretrained(tmp_path / "model", standalone=True)
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "HF_MODULES_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", OTHER_PROCESS, str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    names = "UniTok UniTokProcessor UniTokForConditionalGeneration"
    assert done.stdout.strip().endswith(names), done.stderr
    again = tmp_path / "model" / "again"
    assert sorted(p.name for p in again.glob("*.py")) == ["open_unitok_classes.py"]
    model.save_pretrained(tmp_path / "plain")
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())
