"""Prompts, special ids, labels and masks: equal to the published collator's, with legacy=True and False."""

import json

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from open_unitok.core.errors import UserError
from open_unitok.mllm import UniTokProcessor
from open_unitok.mllm.config import IGNORED
from open_unitok.mllm.prompts import TEMPLATES, expand_images


@pytest.fixture(scope="module")
def expected(golden):
    return json.loads((golden / "mllm" / "labels_prompts.json").read_text())


@pytest.fixture(scope="module")
def processor(golden, tmp_path_factory):
    """processor(legacy, **options) -> a processor that was saved and loaded."""

    def make(legacy: bool, **options) -> UniTokProcessor:
        folder = tmp_path_factory.mktemp("processor")
        model = golden / "mllm" / "tokenizer.model"
        UniTokProcessor.from_text_tokenizer(model, legacy=legacy, **options).save_pretrained(folder)
        return UniTokProcessor.from_pretrained(folder)

    return make


def ids_and_labels(processor, case):
    """A golden sample by the processor; the pieces are joined as in the published collator."""
    sample, uniform = case["sample"], case["np_random_rand"]
    image = processor.image_token_id
    kind, text = sample["data_type"], sample.get("text")
    long = sample.get("InVL_caption")
    if kind == "T2I":
        both = text != "no" and long != "no"
        caption = (text if uniform > 0.8 else long) if both else (text if text != "no" else long)
        unconditional = caption == "no" or uniform > 0.9
        *prompt, boi = (
            processor.unconditional_ids() if unconditional else processor.text_to_image_ids(caption)
        )
        target = [boi, image, processor.eoi_token_id, processor.eos_token_id]
        return prompt + target, [IGNORED] * len(prompt) + target
    if kind == "I2T":
        bos, *words = processor.encode_text(long)
        given = [bos, processor.boi_token_id, image, processor.eoi_token_id]
        target = [*words, processor.eos_token_id]
        return given + target, [IGNORED] * 4 + target
    if kind == "mllm_pretrain":
        return processor.alignment_ids(json.loads(text))
    if kind == "mllm_finetune":
        return processor.conversation_ids(json.loads(text))
    ids = processor.encode_text(text)
    return ids, ids


@pytest.mark.parametrize("legacy", [True, False])
def test_golden_samples(expected, processor, legacy):
    ours = processor(legacy)
    assert ours.legacy is legacy
    cases = [c for c in expected["cases"] if c["legacy"] is legacy and "sample" in c]
    assert len(cases) >= 14
    for case in cases:
        ids, labels = ids_and_labels(ours, case)
        assert ids == case["input_ids"][0], case["name"]
        assert labels == case["labels"][0], case["name"]


def test_golden_prompts(expected, processor):
    ours = processor(True)
    assert ours.question_ids("What is in this photo", tokens=1) == expected["vqa_prompt_ids"]
    rows = [ours.text_to_image_ids(prompt) for prompt in expected["t2i_prompts"]]
    ids, mask = ours.pad([*rows, ours.unconditional_ids(), ours.unconditional_ids()])
    assert ids.tolist() == expected["t2i_ids"]
    assert mask.tolist() == expected["t2i_mask"]
    right, mask = ours.pad([[5], [6, 7]], side="right")
    assert right.tolist() == [[5, 0], [6, 7]] and mask.tolist() == [[1, 0], [1, 1]]


def test_special_ids(processor):
    assert processor(True).token_ids() == {
        "image_token_id": -200,
        "boi_token_id": 3,
        "eoi_token_id": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def test_images_are_before_the_question_or_at_its_marks(processor):
    ours = processor(True, template="plain", num_image_tokens=3)
    two = ours.question_ids("What is in this photo", num_images=2)
    assert two.count(-200) == 6
    first, second = two.index(-200), len(two) - 1 - two[::-1].index(-200)
    assert two[first : first + 3] == two[second - 2 : second + 1] == [-200] * 3
    assert ours.decode(two).split() == ["USER:", "What", "is", "in", "this", "photo", "ASSISTANT:"]
    assert ours.question_ids("a <image> photo", num_images=1).count(-200) == 3
    assert -200 not in ours.question_ids("What is in this photo", num_images=0)
    with pytest.raises(UserError, match=r"marks 1 images .* but 2 were given"):
        ours.question_ids("a <image> photo", num_images=2)
    assert expand_images([1, -200, 5, -200], -200, [[-200] * 2, [7]]) == [1, -200, -200, 5, 7]


def test_decode_skips_images_and_special_ids(processor):
    ours = processor(True)
    ids = ours.encode_text("A photo of a cat")
    assert ours.decode([*ids, -200, -200, 2]) == "A photo of a cat"
    assert ours.decode(torch.tensor(ids)) == "A photo of a cat"


def test_a_long_text_to_image_prompt_is_truncated_before_boi(processor):
    ours = processor(True, max_prompt=6)
    ids = ours.text_to_image_ids("A photo of a cat in a blue sky")
    assert len(ids) == 7 and ids[-1] == ours.boi_token_id
    # within the limit, the instruction follows the text
    ids = processor(True).text_to_image_ids("A photo of a cat")
    assert ids[-1] == ours.boi_token_id
    assert ours.decode(ids[:-1]) == "A photo of a cat" + TEMPLATES["vicuna_v1"].text_to_image


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([], "has 0 turns"),
        ([{"from": "human", "value": "a"}], "has 1 turns"),
        ([{"from": "human", "value": "a"}, {"from": "human", "value": "b"}], "Turn 1 .* 'gpt'"),
    ],
)
def test_invalid_conversations_are_rejected(processor, turns, words):
    with pytest.raises(UserError, match=words):
        processor(True).conversation_ids(turns)


def test_unknown_templates_and_missing_tokenizers_are_rejected(golden, tmp_path):
    model = golden / "mllm" / "tokenizer.model"
    with pytest.raises(UserError, match=r"Did you mean 'vicuna_v1'"):
        UniTokProcessor.from_text_tokenizer(model, template="vicuna")
    with pytest.raises(UserError, match=r"no chat template"):
        UniTokProcessor.from_text_tokenizer(model, template="chat")
    with pytest.raises(UserError, match=r"neither tokenizer.json nor tokenizer.model"):
        UniTokProcessor.from_text_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"is not a text tokenizer"):
        UniTokProcessor.from_text_tokenizer(tmp_path / "no.model")
    with pytest.raises(UserError, match=r"processor_config.json"):
        UniTokProcessor.from_pretrained(tmp_path)


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def without_bos():
    """A byte-level tokenizer like Qwen's: no bos, no byte tokens like LLaMA's, a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


TURNS = [
    {"from": "human", "value": "<image>\nWhat?"},
    {"from": "gpt", "value": "A cat."},
    {"from": "human", "value": "Sure?"},
    {"from": "gpt", "value": "Yes."},
]


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_tokenizers_of_other_families(without_bos, tmp_path, template):
    UniTokProcessor(without_bos, num_image_tokens=2, template=template).save_pretrained(tmp_path)
    ours = UniTokProcessor.from_pretrained(tmp_path)
    assert ours.bos_token_id is None and ours.vocab_size == 260
    assert sorted([ours.boi_token_id, ours.eoi_token_id]) == [258, 259]
    assert ours.pad_token_id == ours.eos_token_id
    ids, labels = ours.conversation_ids(TURNS)
    targets = ours.text_tokenizer.decode([i for i in labels if i != IGNORED])
    assert targets.replace(" ", "") == "Acat.<|im_end|>Yes.<|im_end|>"
    assert ids.count(-200) == 1
    # the prompt at inference is a prefix of the training sample
    question = ours.question_ids("What?", tokens=1)
    assert ids[: len(question)] == question
    assert labels[: len(question)] == [IGNORED] * len(question) and labels[len(question)] != IGNORED
    assert ours.text_to_image_ids("a cat")[-1] == ours.boi_token_id
