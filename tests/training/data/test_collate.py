"""Rows and batches: ids, labels and masks as published, for every kind; packing; rejected samples."""

import itertools
import json

import numpy as np
import pytest
import torch

from open_unitok.mllm import UniTokProcessor
from open_unitok.training.data.collate import TrainingSample, collate, pack_rows
from open_unitok.training.data.sample_kinds import IGNORE_INDEX, SAMPLE_KINDS
from open_unitok.training.data.sequences import SequenceBuilder
from open_unitok.training.data.tar_index import BadSample

IMAGE, TOKENS, BOOKS = -200, 4, 4
PUBLISHED_KINDS = {
    "T2I": "text_to_image",
    "I2T": "captioning",
    "mllm_pretrain": "alignment",
    "mllm_finetune": "conversation",
    "text": "text",
}


def make_sequences(golden, legacy=True, template="vicuna_v1", max_length=1000):
    processor = UniTokProcessor.from_text_tokenizer(
        golden / "mllm" / "tokenizer.model", num_image_tokens=TOKENS, template=template, legacy=legacy
    )
    return SequenceBuilder(processor, max_length)


@pytest.fixture(scope="module")
def sequences(golden):
    return make_sequences(golden, template="plain")


def published_cases(golden):
    cases = json.loads((golden / "mllm" / "labels_prompts.json").read_text())["cases"]
    return [case for case in cases if "sample" in case]


def published_text(sample: dict, random: float) -> str | None:
    """The text that the published collator chooses with its constant random number."""
    kind, short, long = sample["data_type"], sample.get("text", "no"), sample.get("InVL_caption", "no")
    if kind == "I2T":
        return long
    if kind != "T2I":
        return short
    caption = (
        (short if random > 0.8 else long) if "no" not in (short, long) else min(short, long, key="no".__eq__)
    )
    return None if random > 0.9 or caption == "no" else caption


@pytest.mark.parametrize("legacy", [True, False])
def test_rows_are_as_published(golden, legacy):
    sequences = make_sequences(golden, legacy)
    seen = set()
    for case in (c for c in published_cases(golden) if c["legacy"] == legacy):
        sample = case["sample"]
        kind = PUBLISHED_KINDS[sample["data_type"]]
        images = (1,) if IMAGE in case["input_ids"][0] else ()
        text = published_text(sample, case["np_random_rand"])
        if set(case["labels"][0]) == {IGNORE_INDEX}:  # the published code keeps such a sample, without effect
            with pytest.raises(BadSample, match="nothing to learn"):
                sequences.build(kind, text, images)
            continue
        row = sequences.build(kind, text, images)
        assert row.ids.tolist() == case["input_ids"][0], case["name"]
        labels = case["labels"][0]
        if kind != "text_to_image":  # the published code masks images that are only read later
            labels = [IGNORE_INDEX if label == IMAGE else label for label in labels]
        assert row.labels.tolist() == labels, case["name"]
        seen.add(kind)
    assert seen == set(SAMPLE_KINDS) - {
        "document",
        "reading",
        "class_conditional",
    }  # kinds of this package only


def sample(sequences, kind, text, images=1):
    codes = tuple(np.full((TOKENS, BOOKS), 7 + i, dtype=np.uint16) for i in range(images))
    return TrainingSample(kind, sequences.build(kind, text, (TOKENS,) * images), codes)


def talk(question, answer):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return json.dumps(turns)


def mixed(sequences):
    return [
        sample(sequences, "text_to_image", "a red dog"),
        sample(sequences, "conversation", talk("<image>\nWhat is in <image>", "a cat"), images=2),
        sample(sequences, "text", "The quick brown fox in the sky", images=0),
        sample(sequences, "captioning", "a cat"),
        sample(sequences, "text_to_image", None),
    ]


def test_one_batch_holds_all_kinds(sequences):
    samples = mixed(sequences)
    batch = collate(samples, IMAGE, pad_id=0)
    ids, labels, mask = (batch.inputs[name] for name in ("input_ids", "labels", "attention_mask"))
    lengths = [len(s.sequence.ids) for s in samples]
    assert mask.sum(1).tolist() == lengths and batch.tokens == sum(lengths)
    assert all(mask[i, :n].all() for i, n in enumerate(lengths))
    assert batch.inputs["image_codes"].shape == (5, TOKENS, BOOKS)
    assert (ids == IMAGE).sum() == 5 * TOKENS and (labels == IMAGE).sum() == 2 * TOKENS
    assert batch.code_targets == 2 * TOKENS * BOOKS
    shifted = labels[:, 1:]
    assert batch.text_targets == ((shifted != IGNORE_INDEX) & (shifted != IMAGE)).sum()
    assert [list(SAMPLE_KINDS)[k] for k in batch.kinds[:, 0]] == [s.kind for s in samples]


def test_a_real_unknown_token_is_not_masked(sequences):
    unknown = TrainingSample("text", sequences.build("text", "a cat", ()), ())
    unknown.sequence.ids[1] = 0
    batch = collate([unknown, mixed(sequences)[0]], IMAGE, pad_id=0)
    assert batch.inputs["attention_mask"][0, 1] == 1


def test_packed_rows_hold_the_same_samples(sequences):
    samples = mixed(sequences)
    batch = collate(samples, IMAGE, pad_id=0, pack_to=64)
    ids, positions = batch.inputs["input_ids"], batch.inputs["position_ids"]
    assert ids.shape[0] < len(samples) and ids.shape[1] <= 64 and "attention_mask" not in batch.inputs
    found = []
    for row, row_positions in zip(ids, positions):
        starts = [*(row_positions == 0).nonzero().flatten().tolist(), len(row)]
        found += [row[a:b].tolist() for a, b in itertools.pairwise(starts)]
    for s in samples:
        assert s.sequence.ids.tolist() in found
    plain = collate(samples, IMAGE, pad_id=0)
    assert (batch.text_targets, batch.code_targets, batch.tokens) == (
        plain.text_targets,
        plain.code_targets,
        plain.tokens,
    )


@pytest.mark.parametrize("seed", range(5))
def test_packing_fills_rows_and_loses_nothing(seed):
    lengths = np.random.default_rng(seed).integers(1, 60, 100).tolist()
    packed = pack_rows(lengths, 64)
    assert sorted(i for row in packed for i in row) == list(range(100))
    sums = [sum(lengths[i] for i in row) for row in packed]
    assert max(sums) <= 64 and len(packed) <= 1.1 * sum(lengths) / 64 + 1


def test_long_text_is_truncated_but_never_an_image(golden):
    sequences = make_sequences(golden, template="plain", max_length=24)
    assert len(sequences.build("captioning", "a cat " * 50, (TOKENS,)).ids) == 24
    with pytest.raises(BadSample, match="does not fit into max_length 24"):
        sequences.build("text_to_image", "a cat " * 50, (TOKENS,))
    with pytest.raises(BadSample, match="nothing to learn"):
        sequences.build("conversation", talk("<image>\n" + "What " * 50, "a cat"), (TOKENS,))


def test_unusable_samples_raise_bad_sample(sequences):
    with pytest.raises(BadSample, match="human and gpt alternate"):
        sequences.build(
            "conversation", json.dumps([{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]), ()
        )
    with pytest.raises(BadSample, match="names 2 image"):
        sequences.build("conversation", talk("<image><image>", "a"), (TOKENS,))
    different = sample(sequences, "text_to_image", "a cat")._replace(
        images=(np.zeros((2, BOOKS), dtype=np.uint16),)
    )
    with pytest.raises(BadSample, match="different sizes"):
        collate([sample(sequences, "text_to_image", "a dog"), different], IMAGE, 0)


def test_a_text_is_tokenised_once(sequences):
    assert sequences.build("text_to_image", "a red dog", (TOKENS,)) is sequences.build(
        "text_to_image", "a red dog", (TOKENS,)
    )
    assert torch.is_tensor(collate(mixed(sequences), IMAGE, 0).inputs["image_codes"])
