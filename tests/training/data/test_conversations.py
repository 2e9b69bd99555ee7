"""Conversations in awkward forms: of every usable one exactly the answers and their ends are learned."""

import json

import pytest

from open_unitok.core.files import model_path
from open_unitok.mllm import UniTokProcessor
from open_unitok.mllm.prompts import conversation_ids, find_template, located_conversation_ids
from open_unitok.training.data.records import conversation_turns, image_names
from open_unitok.training.data.sample_kinds import IGNORE_INDEX, SAMPLE_KINDS
from open_unitok.training.data.sequences import SequenceBuilder
from open_unitok.training.data.tar_index import BadSample
from open_unitok.training.data.text import Conversations, TextLines


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def talk(*values: str) -> dict[str, list[dict[str, str]]]:
    """Questions and answers in turn."""
    return {"conversations": [(human, gpt)[i % 2](value) for i, value in enumerate(values)]}


def chat(content, answer: str) -> dict[str, list]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


COLOR = "<image>\nWhat color is it?"
ONE = {"image": "a.png"}
TWO = {"image": ["a.png", "b.png"]}
MULTIMODAL = [{"type": "image"}, {"type": "text", "text": "Color?"}]
# name -> (record, the learned texts)
USABLE = {
    "plain": ({**ONE, **talk(COLOR, "red")}, ["red"]),
    "mark_behind": ({**ONE, **talk("What color is it?\n<image>", "red")}, ["red"]),
    "mark_middle": ({**ONE, **talk("What color is <image> here?", "red")}, ["red"]),
    "no_mark": ({**ONE, **talk("What color is it?", "red")}, ["red"]),
    "two": ({**TWO, **talk("<image>\n<image>\nWhich?", "the first")}, ["the first"]),
    "second_turn": (
        {**TWO, **talk(COLOR, "red", "<image>\nAnd this?", "blue")},
        ["red", "blue"],
    ),
    "text_only": ({**talk("Hello?", "hi")}, ["hi"]),
    "image_null": ({"image": None, **talk("Hello?", "hi")}, ["hi"]),
    "image_empty": ({"image": "", **talk("Hello?", "hi")}, ["hi"]),
    "trailing_space_q": ({**ONE, **talk(COLOR + "  ", "red")}, ["red"]),
    "trailing_newline_a": ({**ONE, **talk(COLOR, "red\n")}, ["red\n"]),
    "empty_answer": ({**ONE, **talk(COLOR, "")}, [""]),
    "empty_question": ({**ONE, **talk("<image>", "red")}, ["red"]),
    "assistant_in_question": (
        {**ONE, **talk("<image>\nWhat does ASSISTANT: mean?", "red")},
        ["red"],
    ),
    "assistant_at_end_of_question": (
        talk("Say ASSISTANT:", "red", "And ASSISTANT:", "blue"),
        ["red", "blue"],
    ),
    "assistant_in_answer": ({**talk("Say it.", "USER: a ASSISTANT: b")}, ["USER: a ASSISTANT: b"]),
    "user_in_answer": ({**ONE, **talk(COLOR, "USER: red")}, ["USER: red"]),
    "eos_in_answer": ({**ONE, **talk(COLOR, "red</s>")}, ["red</s>"]),
    "eos_in_question": ({**ONE, **talk("<image>\nWhat is </s> ?", "red")}, ["red"]),
    "gpt_first": ({**ONE, "conversations": [gpt("Welcome"), human(COLOR), gpt("red")]}, ["red"]),
    "system_first": (
        {**ONE, "conversations": [{"from": "system", "value": "Be brief."}, human(COLOR), gpt("red")]},
        ["red"],
    ),
    "human_last": ({**ONE, **talk(COLOR, "red", "Sure?")}, ["red"]),
    "two_humans": ({**ONE, "conversations": [human(COLOR), human("Please."), gpt("red")]}, ["red"]),
    "emoji_cjk": ({**ONE, **talk("<image>\nこれは何色ですか 🤔?", "赤 🔴")}, ["赤 🔴"]),
    "three_turns": (
        {**ONE, **talk(COLOR, "red", "Shape?", "square", "N?", "1")},
        ["red", "square", "1"],
    ),
    "list_content": (
        chat([{"type": "text", "text": "hi"}], "yo"),
        ["yo"],
    ),
    "list_with_image": (
        {**ONE, **chat(MULTIMODAL, "red")},
        ["red"],
    ),
    "mark_in_answer": ({**ONE, **talk(COLOR, "It is <image>.")}, ["It is <image>."]),
}
UNUSABLE = {
    "two_one_mark": ({**TWO, **talk(COLOR, "red")}, "marks 1 image(s) in its questions, but has 2"),
    "mark_without_image": ({**talk("<image>\nHi?", "hi")}, "marks 1 image(s) in its questions, but has 0"),
    "image_in_answer": ({**ONE, **talk("Show it.", "<image>")}, "in an answer, and answers are texts"),
    "two_answers": (
        {"conversations": [human("Hi?"), gpt("a"), gpt("b")]},
        "turn 2 is an answer after an answer",
    ),
    "no_answer": ({**talk("Hi?")}, "no question with an answer"),
    "no_question": ({"conversations": [gpt("Hi!")]}, "no question with an answer"),
    "speaker": ({"conversations": [{"from": "tool", "value": "x"}]}, "expected a speaker"),
    "no_text": ({"conversations": [human("Hi?"), {"from": "gpt", "value": None}]}, "turn 1 is"),
    "surrogate": ({**talk("Hi?", "\ud83d")}, "half of a surrogate pair"),
    "no_turns": ({"conversations": []}, "has no conversations"),
    "names": ({"image": [3], **talk("Hi?", "hi")}, "names its images"),
}


@pytest.fixture(scope="module", params=[("vicuna_v1", True), ("vicuna_v1", False), ("plain", True)])
def processor(request):
    template, legacy = request.param
    return UniTokProcessor.from_pretrained(model_path("scenes"), template=template, legacy=legacy)


def learned_texts(processor, labels) -> list[str]:
    """The text of every run of labels."""
    runs: list[list[int]] = [[]]
    for label in labels:
        if label != IGNORE_INDEX:
            runs[-1].append(int(label))
        elif runs[-1]:
            runs.append([])
    # a space before the first word belongs to its token
    return [processor.text_tokenizer.decode(run).removeprefix(" ") for run in runs if run]


@pytest.mark.parametrize("name", USABLE)
def test_exactly_the_answers_are_learned(processor, name):
    record, answers = USABLE[name]
    turns = conversation_turns(record, len(image_names(record)))
    ids, labels = SAMPLE_KINDS["conversation"].sequence(processor, json.dumps(turns))
    assert learned_texts(processor, labels) == [f"{answer}</s>" for answer in answers]
    assert ids.count(processor.image_token_id) == len(image_names(record))
    assert [label for label in labels if label != IGNORE_INDEX] == [
        i for i, label in zip(ids, labels, strict=True) if label != IGNORE_INDEX
    ]
    # the builder of training caches the text tokenizer
    built = SequenceBuilder(processor, 512).build(
        "conversation", json.dumps(turns), (4,) * len(image_names(record))
    )
    assert learned_texts(processor, built.labels) == [f"{answer}</s>" for answer in answers]


@pytest.mark.parametrize(
    "name", ["plain", "mark_middle", "two", "second_turn", "emoji_cjk", "three_turns", "empty_answer"]
)
def test_labels_by_characters_equal_the_published_ones(processor, name):
    record, _ = USABLE[name]
    turns = conversation_turns(record, len(image_names(record)))
    template, image, end = find_template(processor.template), processor.image_token_id, "</s>"
    published = conversation_ids(turns, processor.encode_text, template, image, end, processor.legacy)

    def encode(text: str):
        found = processor.text_tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    ids, labels = located_conversation_ids(turns, encode, template, image, end)
    assert ([processor.bos_token_id, *ids], [IGNORE_INDEX, *labels]) == published


@pytest.mark.parametrize("name", UNUSABLE)
def test_reasons_of_conversations_that_cannot_be_used(name):
    record, reason = UNUSABLE[name]
    with pytest.raises(BadSample) as error:
        conversation_turns(record, len(image_names(record)))
    assert reason in str(error.value)


def test_questions_in_a_row_and_system_texts():
    turns = conversation_turns(USABLE["system_first"][0], 1)
    assert turns == [human("<image>\nBe brief.\nWhat color is it?"), gpt("red")]
    turns = conversation_turns(USABLE["two_humans"][0], 1)
    assert turns == [human(COLOR + "\nPlease."), gpt("red")]
    # what is stored with codes is read again by the same function
    for record, _ in USABLE.values():
        count = len(image_names(record))
        turns = conversation_turns(record, count)
        assert conversation_turns({"conversations": turns}, count) == turns


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r\n\r\n", b"\n \t\n"])
def test_files_with_marks_and_windows_line_ends(tmp_path, mark, end):
    records = [{**talk("Hi?", f"a\u2028b\x85c{n}")} for n in range(3)]
    lines = [json.dumps(record, ensure_ascii=False).encode() for record in records]
    (tmp_path / "a.jsonl").write_bytes(mark + end.join(lines) + end)
    (tmp_path / "a.json").write_bytes(mark + b"[" + (b"," + end).join(lines) + b"]")
    (tmp_path / "texts.jsonl").write_bytes(mark + end.join(b'{"text": "x%d"}' % n for n in range(3)))
    (tmp_path / "TEXTS.TXT").write_bytes(mark + end.join(f"a\u2028b\x85\x0bc{n}".encode() for n in range(3)))
    for name in ("a.jsonl", "a.json"):
        data = Conversations(tmp_path / name, None)
        answers = [data.read(0, n).info["conversations"][0][1]["value"] for n in range(len(data))]
        assert answers == [f"a\u2028b\x85c{n}" for n in range(3)]
    texts = TextLines(tmp_path / "texts.jsonl")
    assert [texts.read(0, n).info["text"] for n in range(len(texts))] == ["x0", "x1", "x2"]
    texts = TextLines(tmp_path / "TEXTS.TXT")
    assert [texts.read(0, n).info["text"] for n in range(len(texts))] == [
        f"a\u2028b\x85\x0bc{n}" for n in range(3)
    ]


def test_broken_lines_name_their_number_in_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "a"}\n\n{"text": "caf\xe9"}\n{"text": \n{"other": 1}\n"\\ud83d"\n'
    )
    texts = TextLines(tmp_path / "a.jsonl")
    for number, reason in ((1, "line 3, byte 14, is not UTF-8"), (2, "line 4, is not valid JSON")):
        with pytest.raises(BadSample, match=reason):
            texts.read(0, number)
    with pytest.raises(BadSample, match="has no text or content"):
        texts.read(0, 3)
    with pytest.raises(BadSample, match="half of a surrogate pair"):
        texts.read(0, 4)
