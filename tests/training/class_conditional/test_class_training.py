"""Training of class-conditional models: loss, exact resume, accumulation, folders, errors before step 1."""

import math

import pytest
import torch

from open_unitok.core.errors import UserError
from open_unitok.core.files import model_path
from open_unitok.core.text_files import read_json
from open_unitok.generation import Pipeline, Sampling
from open_unitok.mllm.class_conditional import ClassConditionalModel
from open_unitok.training.core import deepspeed_engine
from open_unitok.training.core.schedules import lr_multiplier
from open_unitok.training.run import load_run_config

from .conftest import extract, write_images


def test_starts_at_ln_v_and_overfits_one_batch(classes):
    few = classes.folder / "few.tar"
    write_images(few, 4, "cls", label=lambda n: n % 2)
    extract("--tokenizer", classes.folder / "unitok", "--data", few, "--out", classes.folder / "few")
    data = f"data.mixture=[{{kind: class_conditional, path: {classes.folder}/few}}]"
    run = classes.train(
        "overfit", data, "steps=150", "log.every=1", "optimizer.lr=1e-2", "data.unconditional=0"
    )
    rows = classes.rows(run)
    assert math.isclose(rows[0]["loss"], math.log(16), rel_tol=1e-5)
    # two images share a class: the first token decides which, and the rest is certain
    assert rows[-1]["loss"] < 0.25 and "text_loss" not in rows[0]
    assert rows[-1]["accuracy/2"] > 0.8
    model = ClassConditionalModel.from_pretrained(run / "model")
    assert model.config.null_class is None and model.config.num_classes == 3


def test_resumed_equals_uninterrupted(classes, reference):
    classes.train("resumed", "stop_at=3")
    run = classes.train("resumed")
    assert classes.rows(run) == classes.rows(reference)
    one, other = classes.weights(run), classes.weights(reference)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("overrides", [["engine.accumulation=4"], ["data.workers=2"]])
def test_losses_do_not_depend_on_how_the_batch_is_split(classes, reference, overrides):
    run = classes.train(overrides[0].replace(".", "_"), *overrides)
    for one, other in zip(classes.rows(run), classes.rows(reference), strict=True):
        assert math.isclose(one["loss"], other["loss"], rel_tol=1e-5)
        assert math.isclose(one["grad_norm"], other["grad_norm"], rel_tol=1e-4)


def test_the_folder_generates_images_of_its_classes(classes, reference):
    folder = reference / "model"
    pipe = Pipeline.from_pretrained(folder)
    assert pipe.sampling == Sampling(guidance=1.0) and pipe.model.config.null_class == 3
    images = pipe.generate(classes=[0, 2], num_images=2, seed=5)
    assert len(images) == 4 and images[0].size == (32, 32)
    again = pipe.generate_codes(classes=[2], seed=8)
    assert torch.equal(again[0], pipe.generate_codes(classes=[0, 2], num_images=2, seed=5)[3])
    assert not torch.equal(again, pipe.generate_codes(None, Sampling(guidance=500.0), 8, classes=[2]))
    tuned = classes.train("tuned", "model=null", f"init_from={folder}", "steps=1")
    assert (tuned / "model" / "sampling.json").exists()
    assert read_json(tuned / "model" / "config.json")["num_classes"] == 3


def test_dropouts_of_a_resumed_run_are_those_of_an_uninterrupted_one(classes):
    dropout = ("steps=3", "model.fields.dropout=0.3")
    whole = classes.train("dropout", *dropout)
    classes.train("dropout-halves", *dropout, "stop_at=2")
    halves = classes.train("dropout-halves", *dropout)
    assert classes.rows(whole) == classes.rows(halves)


@pytest.mark.parametrize("change, message", [
    ("model.num_classes=2", "has labels up to 2, but the model has 2 classes .0 to 1."),
    ("model.fields.hidden=3", "Unknown config key 'model.fields.hidden'"),
    ("model.fields.class_dropout=0.5", "Unknown config key 'model.fields.class_dropout'"),
    ("model.size=XS", "model.size is 'XS'"),
    ("conditioner=klass", "conditioner is 'klass'.*class"),
    ("conditioner=text", "conditioner is 'text'"),
    ("data.pack_to=32", "data.pack_to is 32"),
    ("data.mixture=[{kind: captioning, path: x}]", "kind captioning needs conditioner: prompt"),
    ("model=null", "not neither"),
    ("init_from=x", "not both"),
    ("lora={rank: 4}", "lora"),
])  # fmt: skip
def test_errors_are_one_line_before_the_first_batch(classes, change, message):
    with pytest.raises(UserError, match=message) as error:
        classes.train("never", change)
    assert "\n" not in str(error.value) and not (classes.folder / "never" / "metrics.jsonl").exists()


def test_kinds_of_the_other_family_and_models_of_another_type_are_refused(classes, reference, tmp_path):
    config = {"stage": "mllm", "out": "x", "steps": 1, "batch_size": 1, "init_from": "scenes"}
    path = tmp_path / "c.yaml"
    path.write_text(str({**config, "data": {"mixture": [{"kind": "class_conditional", "path": "x"}]}}))
    with pytest.raises(UserError, match="kind class_conditional needs conditioner: class; with prompt"):
        load_run_config(str(path), [])
    with pytest.raises(UserError, match="not a class-conditional model"):
        classes.train("never", "model=null", f"init_from={model_path('scenes')}")
    # without a null class nothing may be dropped
    bare = classes.train("bare", "steps=1", "data.unconditional=0")
    with pytest.raises(UserError, match=r"data.unconditional is 0.1, but the model of .* has no null class"):
        classes.train("never", "model=null", f"init_from={bare}/model")
    with pytest.raises(UserError, match=r"needs class_dropout above 0 in training .a null class."):
        Pipeline.from_pretrained(bare / "model").generate(None, Sampling(guidance=2.0), classes=[0])
    pipe = Pipeline.from_pretrained(reference / "model")
    for given, message in (
        ({"classes": [3]}, "class 3 is not valid: expected 0 to 2"),
        ({"classes": [True]}, "class True is not valid"),
        ({"classes": 1}, "must be a list"),
        ({"prompts": ["a cat"]}, "reads neither text nor images"),
        ({}, "Give prompts or classes, not neither"),
        ({"prompts": ["a"], "classes": [0]}, "not both"),
        ({"classes": [0], "negative_prompt": "x"}, "no negative prompt"),
    ):
        with pytest.raises(UserError, match=message):
            pipe.generate(**given)
    for call in (lambda: pipe.answer([None], ["who?"]), lambda: pipe.chat("who?")):
        with pytest.raises(UserError, match="reads neither text nor images"):
            call()
    with pytest.raises(UserError, match=r"adapter is 'a', but .* is a class-conditional model"):
        Pipeline.from_pretrained(reference / "model", adapter="a")
    with pytest.raises(UserError, match="does not run class-conditional models"):
        Pipeline.from_pretrained(reference / "model", backend="native")


def test_weight_decay_is_on_tensors_of_two_or_more_dimensions(classes, reference):
    model = ClassConditionalModel.from_pretrained(reference / "model")
    groups = deepspeed_engine.parameter_groups(model, 0.05)
    decayed = {id(p) for group in groups if group["weight_decay"] == 0.05 for p in group["params"]}
    assert decayed == {id(p) for p in model.parameters() if p.ndim >= 2}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_the_published_schedules():
    unitok = load_run_config("configs/mllm/c2i_unitok_xxl.yaml", [])
    total, warmup = math.ceil(300 * 1_281_167 / 1024), int(0.03 * math.ceil(300 * 1_281_167 / 1024))
    schedule = unitok.schedule
    for step in (0, 1, 5000, warmup - 1, warmup, warmup + 1, 200_000, total - 1, total):
        expected = (
            step / warmup
            if step < warmup
            else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
        )
        found = lr_multiplier(
            schedule.kind, step, unitok.steps, schedule.warmup, schedule.start, schedule.end
        )
        assert found == pytest.approx(expected, abs=1e-12)
    llamagen = load_run_config("configs/mllm/c2i_llamagen.yaml", [])
    assert lr_multiplier(llamagen.schedule.kind, 10**6, llamagen.steps) == 1.0
