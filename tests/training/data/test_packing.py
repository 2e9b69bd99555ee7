"""Packed rows: no attention between samples, no loss on first tokens, the same losses as unpacked."""

import json

import numpy as np
import pytest
import torch

from open_unitok.mllm import UniTokForConditionalGeneration, UniTokMLLMConfig, UniTokProcessor
from open_unitok.training.core.flops import TokenCounts
from open_unitok.training.data.collate import TrainingSample, collate
from open_unitok.training.data.sample_kinds import IGNORE_INDEX
from open_unitok.training.data.sequences import SequenceBuilder
from open_unitok.training.mllm.metrics import RunningMetrics

IMAGE, TOKENS, BOOKS, ENTRIES = -200, 4, 3, 16
TALK = [{"from": "human", "value": "<image>\nWhat is in <image>"}, {"from": "gpt", "value": "a cat"}]


@pytest.fixture(scope="module")
def processor(golden):
    path = golden / "mllm" / "tokenizer.model"
    return UniTokProcessor.from_text_tokenizer(path, num_image_tokens=TOKENS, template="plain")


@pytest.fixture(scope="module")
def sequences(processor):
    return SequenceBuilder(processor, 100)


@pytest.fixture(scope="module")
def samples(sequences):
    """Samples of every kind, with zero, one and two images."""
    random = np.random.default_rng(0)

    def make(kind, text, images):
        codes = tuple(random.integers(0, ENTRIES, (TOKENS, BOOKS)).astype(np.uint16) for _ in range(images))
        return TrainingSample(kind, sequences.build(kind, text, (TOKENS,) * images), codes)

    return [
        make("text_to_image", "a red dog", 1),
        make("text", "The quick brown fox", 0),
        make("conversation", json.dumps(TALK), 2),
        make("captioning", "a cat", 1),
        make("document", json.dumps([0, "a cat in the sky", 1]), 2),
        make("text_to_image", None, 1),
        make("reading", json.dumps(["a dog", 0, "a fox"]), 1),
        make("text", "in the blue sky", 0),
    ]


@pytest.fixture(scope="module")
def model(processor):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"model_type": "llama", "vocab_size": processor.vocab_size, **sizes}
    ids = {name: i for name, i in processor.token_ids().items() if i is not None}
    codes = {"num_codebooks": BOOKS, "codebook_size": ENTRIES, "codebook_dim": 4, "visual_hidden_size": 24}
    depth = {"num_hidden_layers": 1}
    config = UniTokMLLMConfig(
        text_config={**text, "max_position_embeddings": 256}, depth_config=depth, **codes, **ids,
        num_image_tokens=TOKENS, projection_heads=2,
    )  # fmt: skip
    return UniTokForConditionalGeneration(config).eval()


def losses(model, batch):
    """(text, image) losses summed over targets, and their numbers."""
    out = model(**batch.inputs, reduction="sum", return_logits=False)
    return out.text_loss.item(), out.image_loss.item(), int(out.text_tokens), int(out.image_codes)


@pytest.mark.parametrize("pack_to", [1, 48, 200])
@torch.no_grad()
def test_the_packed_loss_is_the_sum_over_the_samples(model, samples, pack_to):
    """Sums over targets, so the mean is the token-weighted mean of the separate losses."""
    separate = np.array([losses(model, collate([sample], IMAGE, 0)) for sample in samples])
    packed = collate(samples, IMAGE, 0, pack_to=pack_to)
    found = losses(model, packed)
    np.testing.assert_allclose(found, separate.sum(axis=0), rtol=2e-6)
    assert (found[2], found[3]) == (packed.text_targets, packed.code_targets)
    rows = {200: 1, 48: len(packed.kinds), 1: len(packed.kinds)}[pack_to]
    assert len(packed.kinds) == rows < len(samples)


@torch.no_grad()
def test_packed_samples_do_not_attend_to_each_other(model, samples):
    """A sample's hidden states do not depend on its neighbours in the row."""
    one = collate(samples, IMAGE, 0, pack_to=200)
    changed = [samples[0]._replace(images=(samples[0].images[0] * 0,)), *samples[1:]]
    other = collate(changed, IMAGE, 0, pack_to=200)
    states = [model(**b.inputs, return_logits=False).last_hidden_state[0] for b in (one, other)]
    differs = (states[0] - states[1]).abs().amax(dim=-1) > 1e-6
    starts = (one.inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
    spans = [slice(a, b) for a, b in zip(starts, [*starts[1:], None])]
    touched = [i for i, span in enumerate(spans) if differs[span].any()]
    assert len(touched) == 1
    ids = one.inputs["input_ids"][0][spans[touched[0]]]
    assert ids.tolist() == samples[0].sequence.ids.tolist()


@torch.no_grad()
def test_a_first_token_is_never_a_target(model, samples):
    """Plain text labels its first id, but no loss is computed for the first id of a row or packed sample."""
    texts = [sample for sample in samples if sample.kind == "text"] * 2
    assert all(sample.sequence.labels[0] != IGNORE_INDEX for sample in texts)
    for batch in (collate(texts, IMAGE, 0), collate(texts, IMAGE, 0, pack_to=100)):
        wanted = sum(len(sample.sequence.ids) - 1 for sample in texts)
        assert losses(model, batch)[2] == wanted == batch.text_targets
    first = [np.where(np.arange(len(s.sequence.ids)) == 0, 9, IGNORE_INDEX) for s in texts]
    moved = [s._replace(sequence=s.sequence._replace(labels=labels)) for s, labels in zip(texts, first)]
    assert losses(model, collate(moved, IMAGE, 0, pack_to=100))[2] == 0


@torch.no_grad()
def test_a_real_pad_id_is_not_masked(model, sequences):
    """Masks come from lengths: a real unknown token, whose id is also the pad id, is not masked."""
    row = sequences.build("text", "a cat in the blue sky", ())
    row = row._replace(ids=row.ids.copy(), labels=row.labels.copy())
    row.ids[3] = row.labels[3] = sequences.processor.pad_token_id
    short = TrainingSample("text", sequences.build("text", "a cat", ()), ())
    unknown = TrainingSample("text", row, ())
    alone = losses(model, collate([unknown], IMAGE, 0)), losses(model, collate([short], IMAGE, 0))
    for pack_to in (0, 64):
        found = losses(model, collate([unknown, short], IMAGE, 0, pack_to=pack_to))
        assert found[2] == len(row.ids) - 1 + len(short.sequence.ids) - 1
        assert found[0] == pytest.approx(alone[0][0] + alone[1][0], rel=2e-6)


@pytest.mark.parametrize("pack_to", [0, 1, 48, 200, 1000])
def test_token_counts_exclude_padding(model, samples, pack_to):
    """Padded, packed with padding, packed without: the token counts equal those of the separate samples."""
    metrics = RunningMetrics(model, torch.device("cpu"))
    metrics.add(torch.zeros(BOOKS), collate(samples, IMAGE, 0, pack_to=pack_to))
    lengths = [len(sample.sequence.ids) for sample in samples]
    work = TokenCounts(*metrics.counts.tolist())
    assert work.tokens == sum(lengths)
    assert work.attention_pairs == sum(
        sum(range(1, length + 1)) for length in lengths
    )  # itself and those before it
    one_by_one = RunningMetrics(model, torch.device("cpu"))
    for sample in samples:
        one_by_one.add(torch.zeros(BOOKS), collate([sample], IMAGE, 0))
    assert one_by_one.counts.equal(metrics.counts)
