"""Depth heads and input embedders of other systems from a YAML to images, answers and adapters."""

import json

import pytest
import torch
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.generation import Pipeline, Sampling
from open_unitok.mllm import UniTokForConditionalGeneration

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


ADDED = [f"visual_embedder.{name}_embedding.weight" for name in ("row", "column")]


@pytest.fixture(scope="module")
def given(mllm_reference):
    """Overrides of a run that adds place vectors to a trained model."""
    return ["model=null", f"init_from={mllm_reference / 'model'}", "visual_positions=learned_2d", "steps=1"]


def test_a_trained_model_gets_place_vectors(mllm, mllm_reference, given):
    start = mllm.train("places-start", *given, "optimizer.lr=0")
    folder = mllm.train("places", *given)
    before, added, trained = (mllm.weights(f) for f in (mllm_reference, start, folder))
    assert added.keys() - before.keys() == {*ADDED}
    assert not any(torch.equal(added[name], trained[name]) for name in ADDED)
    pipe = Pipeline.from_pretrained(folder / "model")
    assert pipe.generate(["a red cat"], Sampling(guidance=2.0), seed=1)[0].size == (32, 32)
    # a model that has them keeps them, with the key and without
    for name, key in (("again", "learned_2d"), ("without", "null")):
        again = ["model=null", f"init_from={folder / 'model'}", f"visual_positions={key}", "steps=1"]
        kept = mllm.weights(mllm.train(f"places-{name}", *again, "optimizer.lr=0"))
        assert all(torch.equal(kept[name], trained[name]) for name in ADDED)


def test_added_place_vectors_have_the_norm_and_the_seed(mllm, mllm_reference, given):
    """A third of the norm of the visual vectors, from the seed of the run alone."""
    found = []
    for number, seed in enumerate((0, 0, 1)):
        folder = mllm.train(f"places-{number}", *given, f"seed={seed}", "optimizer.lr=0")
        found.append([mllm.weights(folder)[name] for name in ADDED])
    one, same, other = found
    assert all(map(torch.equal, one, same)) and not any(map(torch.equal, one, other))
    embedder = UniTokForConditionalGeneration.from_pretrained(mllm_reference / "model").visual_embedder
    shape = (64, embedder.config.num_image_tokens, embedder.num_codebooks)
    with torch.no_grad():
        visual = embedder(torch.randint(embedder.codebook_size, shape)).square().mean().sqrt().item()
    for vectors in (*one, *other):
        # two independent vectors are added; each table has few numbers, hence the tolerance
        assert vectors.square().mean().sqrt().item() == pytest.approx(visual / 3 / 2**0.5, rel=0.3)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["lora={rank: 2, alpha: 4}"], "train them first in a run without lora, then give that model as"),
        (["lr_factors={visual_embedder: 0}"], "lr_factors.visual_embedder = 0 would freeze"),
        (["visual_positions=none"], "visual_positions"),
    ],
)
def test_runs_that_could_not_train_place_vectors_are_refused(mllm, given, overrides, words):
    with pytest.raises(UserError, match=words):
        mllm.train("refused", *given, *overrides)


def test_a_new_model_has_place_vectors_by_its_fields(mllm):
    with pytest.raises(UserError, match=r"a new model has them by model\.fields\.visual_positions"):
        mllm.train("refused", "visual_positions=learned_2d")


def test_impossible_options_are_refused_before_the_first_batch(mllm):
    with pytest.raises(UserError, match="needs input_embedder = 'tables'"):
        mllm.train("refused", "model.fields={depth_options: {tables: shared}}")
    assert not (mllm.folder / "refused" / "metrics.jsonl").exists()
