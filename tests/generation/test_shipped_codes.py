"""The shipped model generates pinned codes and answers. They were computed when its weights were replaced, by
code that still computed for the earlier weights what the first version had.

Its code rows are stored in bfloat16 with a mean norm of 0.96 and normalised on use.
"""

import json
from pathlib import Path

import pytest
import torch

from open_unitok.generation import Pipeline, Sampling
from open_unitok.generation.backends import BACKENDS
from open_unitok.generation.sampling import apply_guidance

GUIDANCE = 5.0


@pytest.fixture(scope="module")
def shipped():
    return Pipeline.from_pretrained("scenes", device="cpu")


@pytest.fixture(scope="module")
def pinned():
    found = json.loads((Path(__file__).parent / "shipped_model.json").read_text())
    found["codes"] = torch.tensor([list(bytes.fromhex(row)) for row in found["codes"]])
    return found


def test_the_stored_rows_are_not_normalised(shipped, pinned):
    config, rows = shipped.model.config, shipped.model.visual_embedder.codebooks
    assert config.row_norm == "unit" and config.token_layout is None
    assert config.unitok_fingerprint == pinned["unitok_fingerprint"] == shipped.unitok.fingerprint()
    assert abs(rows.norm(dim=-1).mean().item() - 0.96) < 0.01
    table = shipped.model.visual_embedder.code_table()
    torch.testing.assert_close(table.norm(dim=-1), torch.ones(table.shape[:2]))
    codes = pinned["codes"].view(3, -1, config.num_codebooks)
    embedded = shipped.model.visual_embedder.embed(codes)
    # the tokenizer stores its rows in float32
    torch.testing.assert_close(embedded, shipped.unitok.quantizer.embed(codes), atol=5e-3, rtol=0)


def test_greedy_codes(shipped, pinned):
    """On every processor each pinned code has the largest guided logit, up to rounding."""
    model, processor = shipped.model, shipped.processor
    codes = pinned["codes"].view(3, -1, model.config.num_codebooks)
    rows = [*shipped.prompt_ids(pinned["prompts"]), *[processor.unconditional_ids()] * 3]
    backend = BACKENDS["torch"](model)
    with torch.no_grad():
        backend.prefill(rows, codes[:, :0])
        for t in range(codes.shape[1]):
            if t:
                backend.decode_step(codes[:, t - 1])
            for k in range(codes.shape[2]):
                logits = backend.code_logits(k, None if k == 0 else codes[:, t, k - 1])
                logits = apply_guidance(logits, GUIDANCE)
                gap = logits.amax(-1) - logits.gather(1, codes[:, t, k, None])[:, 0]
                assert (gap < 1e-3).all(), (t, k, gap)


def test_generated_codes_and_answers(shipped, pinned):
    sampling = Sampling(guidance=GUIDANCE, greedy=True)
    codes = shipped.generate_codes(pinned["prompts"], sampling)
    expected = pinned["codes"].view_as(codes)
    # rounding differs between processors: after the first near-tie an image may differ
    assert (codes == expected).all(dim=(1, 2)).sum() >= 2
    images = shipped.decode(expected)
    assert shipped.answer(images, pinned["questions"]) == pinned["answers"]
