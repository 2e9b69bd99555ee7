"""Rows and batches: ids, labels and masks as published, for every kind; packing; what is refused."""

import itertools
import json

import numpy as np
import pytest
import torch

from open_unitok.mllm import UniTokProcessor
from open_unitok.training.data.collate import IGNORED, KINDS, Rows, Sample, collate, pack
from open_unitok.training.data.tar_index import BadSample

IMAGE, TOKENS, BOOKS = -200, 4, 4
PUBLISHED_KINDS = {
    "T2I": "text_to_image",
    "I2T": "captioning",
    "mllm_pretrain": "alignment",
    "mllm_finetune": "conversation",
    "text": "text",
}


def make_rows(golden, legacy=True, template="vicuna_v1", max_length=1000):
    processor = UniTokProcessor.from_text_tokenizer(
        golden / "mllm" / "tokenizer.model", num_image_tokens=TOKENS, template=template, legacy=legacy
    )
    return Rows(processor, max_length)


@pytest.fixture(scope="module")
def rows(golden):
    return make_rows(golden, template="plain")


def published_cases(golden):
    cases = json.loads((golden / "mllm" / "labels_prompts.json").read_text())["cases"]
    return [case for case in cases if "sample" in case]


def published_text(sample: dict, draw: float) -> str | None:
    """The text that the published collator takes, given its one constant random number."""
    kind, short, long = sample["data_type"], sample.get("text", "no"), sample.get("InVL_caption", "no")
    if kind == "I2T":
        return long
    if kind != "T2I":
        return short
    caption = (
        (short if draw > 0.8 else long) if "no" not in (short, long) else min(short, long, key="no".__eq__)
    )
    return None if draw > 0.9 or caption == "no" else caption


@pytest.mark.parametrize("legacy", [True, False])
def test_rows_are_as_published(golden, legacy):
    rows = make_rows(golden, legacy)
    seen = set()
    for case in (c for c in published_cases(golden) if c["legacy"] == legacy):
        sample = case["sample"]
        kind = PUBLISHED_KINDS[sample["data_type"]]
        images = (1,) if IMAGE in case["input_ids"][0] else ()
        text = published_text(sample, case["np_random_rand"])
        if set(case["labels"][0]) == {IGNORED}:  # the published code keeps it, to no effect
            with pytest.raises(BadSample, match="nothing to learn"):
                rows.make(kind, text, images)
            continue
        row = rows.make(kind, text, images)
        assert row.ids.tolist() == case["input_ids"][0], case["name"]
        learnt = [
            IGNORED if kind != "text_to_image" and label == IMAGE else label for label in case["labels"][0]
        ]
        assert row.labels.tolist() == learnt, case["name"]
        seen.add(kind)
    assert seen == set(KINDS) - {"document", "reading"}  # which the published code does not know


def sample(rows, kind, text, images=1):
    codes = tuple(np.full((TOKENS, BOOKS), 7 + i, dtype=np.uint16) for i in range(images))
    return Sample(kind, rows.make(kind, text, (TOKENS,) * images), codes)


def talk(question, answer):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return json.dumps(turns)


def mixed(rows):
    return [
        sample(rows, "text_to_image", "a red dog"),
        sample(rows, "conversation", talk("<image>\nWhat is in <image>", "a cat"), images=2),
        sample(rows, "text", "The quick brown fox in the sky", images=0),
        sample(rows, "captioning", "a cat"),
        sample(rows, "text_to_image", None),
    ]


def test_one_batch_holds_all_kinds(rows):
    samples = mixed(rows)
    batch = collate(samples, IMAGE, pad_id=0)
    ids, labels, mask = (batch.inputs[name] for name in ("input_ids", "labels", "attention_mask"))
    lengths = [len(s.row.ids) for s in samples]
    assert mask.sum(1).tolist() == lengths and batch.tokens == sum(lengths)
    assert all(mask[i, :n].all() for i, n in enumerate(lengths))
    assert batch.inputs["image_codes"].shape == (5, TOKENS, BOOKS)
    assert (ids == IMAGE).sum() == 5 * TOKENS and (labels == IMAGE).sum() == 2 * TOKENS
    assert batch.code_targets == 2 * TOKENS * BOOKS
    shifted = labels[:, 1:]
    assert batch.text_targets == ((shifted != IGNORED) & (shifted != IMAGE)).sum()
    assert [KINDS[k] for k in batch.kinds[:, 0]] == [s.kind for s in samples]


def test_a_genuine_unknown_token_stays(rows):
    unknown = Sample("text", rows.make("text", "a cat", ()), ())
    unknown.row.ids[1] = 0
    batch = collate([unknown, mixed(rows)[0]], IMAGE, pad_id=0)
    assert batch.inputs["attention_mask"][0, 1] == 1


def test_packed_rows_hold_the_same_samples(rows):
    samples = mixed(rows)
    batch = collate(samples, IMAGE, pad_id=0, pack_to=64)
    ids, positions = batch.inputs["input_ids"], batch.inputs["position_ids"]
    assert ids.shape[0] < len(samples) and ids.shape[1] <= 64 and "attention_mask" not in batch.inputs
    found = []
    for row, places in zip(ids, positions):
        starts = [*(places == 0).nonzero().flatten().tolist(), len(row)]
        found += [row[a:b].tolist() for a, b in itertools.pairwise(starts)]
    for s in samples:
        assert s.row.ids.tolist() in found
    plain = collate(samples, IMAGE, pad_id=0)
    assert (batch.text_targets, batch.code_targets, batch.tokens) == (
        plain.text_targets,
        plain.code_targets,
        plain.tokens,
    )


@pytest.mark.parametrize("seed", range(5))
def test_packing_fills_rows_and_loses_nothing(seed):
    lengths = np.random.default_rng(seed).integers(1, 60, 100).tolist()
    packed = pack(lengths, 64)
    assert sorted(i for row in packed for i in row) == list(range(100))
    sums = [sum(lengths[i] for i in row) for row in packed]
    assert max(sums) <= 64 and len(packed) <= 1.1 * sum(lengths) / 64 + 1


def test_long_text_is_cut_but_never_an_image(golden):
    rows = make_rows(golden, template="plain", max_length=24)
    assert len(rows.make("captioning", "a cat " * 50, (TOKENS,)).ids) == 24
    with pytest.raises(BadSample, match="does not fit into max_length 24"):
        rows.make("text_to_image", "a cat " * 50, (TOKENS,))
    with pytest.raises(BadSample, match="nothing to learn"):
        rows.make("conversation", talk("<image>\n" + "What " * 50, "a cat"), (TOKENS,))


def test_what_cannot_be_used_is_a_bad_sample(rows):
    with pytest.raises(BadSample, match="take turns"):
        rows.make(
            "conversation", json.dumps([{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]), ()
        )
    with pytest.raises(BadSample, match="names 2 image"):
        rows.make("conversation", talk("<image><image>", "a"), (TOKENS,))
    different = sample(rows, "text_to_image", "a cat")._replace(
        images=(np.zeros((2, BOOKS), dtype=np.uint16),)
    )
    with pytest.raises(BadSample, match="different sizes"):
        collate([sample(rows, "text_to_image", "a dog"), different], IMAGE, 0)


def test_a_text_is_tokenised_once(rows):
    assert rows.make("text_to_image", "a red dog", (TOKENS,)) is rows.make(
        "text_to_image", "a red dog", (TOKENS,)
    )
    assert torch.is_tensor(collate(mixed(rows), IMAGE, 0).inputs["image_codes"])
