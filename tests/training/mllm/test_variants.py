"""Depth heads and input embedders of other systems from a YAML to images, answers and adapters."""

import json

import pytest
import torch
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.generation import Pipeline, Sampling

FQGAN = "{rotary: grid, tables: shared, outputs: own, output_bias: false, zero_outputs: true, context: raw}"
FIELDS = f"model.fields={{input_embedder: tables, depth_options: {FQGAN}}}"


@pytest.fixture(scope="module")
def trained(mllm):
    return mllm.train("fqgan", FIELDS, "steps=2")


def test_a_run_leaves_a_model_that_generates_and_answers(trained, mllm):
    records = mllm.rows(trained)
    # output layers start from zero: the first loss of an image is that of equal probabilities
    assert records[0]["image_loss"] == pytest.approx(torch.tensor(16.0).log().item(), abs=1e-4)
    assert records[1]["loss"] < records[0]["loss"]
    pipe = Pipeline.from_pretrained(trained / "model")
    (image,) = pipe.generate(["a red cat"], Sampling(guidance=2.0), seed=1)
    assert image.size == (32, 32)
    assert pipe.generate(["a red cat"], Sampling(guidance=2.0), seed=1)[0].tobytes() == image.tobytes()
    assert isinstance(pipe.answer([Image.new("RGB", (40, 30))], ["What is it?"], max_new_tokens=3)[0], str)
    assert "depth_options" in json.loads((trained / "model" / "config.json").read_text())


def test_adapters_train_on_it(trained, mllm):
    given = ["model=null", f"init_from={trained / 'model'}", "lora={rank: 2, alpha: 4}", "steps=1"]
    folder = mllm.train("fqgan-lora", *given)
    pipe = Pipeline.from_pretrained(trained / "model", adapter=folder / "model")
    assert pipe.generate(["a fox"], Sampling(guidance=1.0), seed=0)[0].size == (32, 32)


def test_a_trained_model_gets_place_vectors(mllm, mllm_reference):
    given = ["model=null", f"init_from={mllm_reference / 'model'}", "visual_positions=learned_2d", "steps=2"]
    folder = mllm.train("places", *given)
    before, after = mllm.weights(mllm_reference), mllm.weights(folder)
    added = {f"visual_embedder.{name}_embedding.weight" for name in ("row", "column")}
    assert after.keys() - before.keys() == added and all(after[name].any() for name in added)
    pipe = Pipeline.from_pretrained(folder / "model")
    assert pipe.generate(["a red cat"], Sampling(guidance=2.0), seed=1)[0].size == (32, 32)
    # a model that has them keeps them
    again = ["model=null", f"init_from={folder / 'model'}", *given[2:], "optimizer.lr=0"]
    kept = mllm.weights(mllm.train("places-again", *again))
    assert all(torch.equal(kept[name], after[name]) for name in added)
    for refused, words in (
        (["visual_positions=learned_2d"], "set model.fields.visual_positions"),
        ([*given, "lora={rank: 2, alpha: 4}"], "adapters do not hold them"),
    ):
        with pytest.raises(UserError, match=words):
            mllm.train("refused", *refused)


def test_impossible_options_are_refused_before_the_first_batch(mllm):
    with pytest.raises(UserError, match="needs input_embedder = 'tables'"):
        mllm.train("refused", "model.fields={depth_options: {tables: shared}}")
    assert not (mllm.folder / "refused" / "metrics.jsonl").exists()
