"""The MLLM stage: one batch is overfitted, a resumed run equals an uninterrupted one, accumulation, packing
and ranks do not change the losses, fine-tuning starts from pretraining; error messages."""

import json
import os
import shutil
import signal

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from open_unitok.core.errors import UserError
from open_unitok.mllm import UniTokForConditionalGeneration, UniTokMLLMOutput, UniTokProcessor
from open_unitok.tokenizer import UniTok
from open_unitok.training.core.metric_logger import MetricLogger
from open_unitok.training.mllm import train
from open_unitok.training.mllm.config import LossOptions
from open_unitok.training.mllm.train import combine_losses


@pytest.fixture(scope="module")
def root(mllm):
    return mllm.folder


@pytest.fixture(scope="module")
def reference(mllm_reference):
    return mllm_reference


def test_one_batch_is_overfitted(mllm, root):
    few = f"[{{kind: text_to_image, path: {root}/few}}, {{kind: conversation, path: {root}/few}}]"
    folder = mllm.train(
        "overfit",
        "steps=160",
        "log.every=40",
        f"data.mixture={few}",
        "data.unconditional=0",
        "optimizer.lr=1e-2",
    )
    first, *_, last = mllm.rows(folder)
    assert first["text_loss"] > 0.5 and first["image_loss"] > 0.5
    assert last["text_loss"] < 0.02 and last["image_loss"] < 0.02
    assert all(last[f"accuracy/{book}"] == 1 for book in range(3))
    assert last["text_loss/text_to_image"] < 0.02 and last["text_loss/conversation"] < 0.02


def test_resumed_equals_uninterrupted(mllm, reference):
    folder = mllm.train("resumed", "stop_at=2")
    assert not (folder / "model").exists()
    mllm.train("resumed", "stop_at=3")
    mllm.train("resumed")
    assert mllm.rows(folder) == mllm.rows(reference)
    one, other = mllm.weights(folder), mllm.weights(reference)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_muon_resumes_exactly_and_steps_are_profiled(mllm):
    muon = ("optimizer.kind=muon", "optimizer.lr=1e-2", "steps=40")
    whole = mllm.train("muon", *muon)
    profile = "profile={start: 2, steps: 1}"
    halves = mllm.train("muon-halves", *muon, "stop_at=5", profile)
    assert sorted(os.listdir(halves / "profile")) == ["steps-3-3.json.gz", "steps-3-3.txt"]
    mllm.train("muon-halves", *muon)
    assert mllm.rows(halves) == mllm.rows(whole)
    one, other = mllm.weights(halves), mllm.weights(whole)
    assert all(torch.equal(one[name], other[name]) for name in other)
    adamw = mllm.weights(mllm.train("adamw", *muon[1:]))
    assert not all(torch.equal(one[name], adamw[name]) for name in one)


@pytest.mark.parametrize(
    "overrides",
    [
        ["engine.accumulation=4"],
        ["data.pack_to=100"],
        ["data.workers=2"],
        ["engine.accumulation=2", "data.group_by_length=true"],
    ],
)
def test_losses_do_not_depend_on_how_the_batch_is_split(mllm, reference, overrides):
    folder = mllm.train("-".join(o.replace(".", "_") for o in overrides), *overrides)
    mllm.same_rows(mllm.rows(folder), mllm.rows(reference), 1e-4)


def test_the_model_folder_has_all_that_inference_needs(root, reference):
    folder = reference / "model"
    model = UniTokForConditionalGeneration.from_pretrained(folder)
    processor = UniTokProcessor.from_pretrained(folder)
    unitok = UniTok.from_pretrained(folder / "unitok")
    assert model.config.unitok_fingerprint == unitok.fingerprint()
    assert processor.template == "plain" and processor.num_image_tokens == unitok.config.num_visual_tokens
    assert torch.equal(model.visual_embedder.codebooks, unitok.quantizer.codebooks)
    facts = json.loads((reference / "run.json").read_text())["facts"]
    assert facts["tokenizer"] == unitok.fingerprint()
    checkpoint = UniTokForConditionalGeneration.from_pretrained(reference / "checkpoints" / "step-00000006")
    assert torch.equal(checkpoint.lm_head.weight, model.lm_head.weight)


def test_fine_tuning_starts_from_a_model_with_parts_frozen(mllm, reference):
    folder = mllm.train(
        "tuned",
        "model=null",
        f"init_from={reference}/model",
        "lr_factors={depth_head: 0, lm_head: 0.5}",
    )
    before, after = mllm.weights(reference), mllm.weights(folder)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith("depth_head.") for name in changed)
    assert "visual_embedder.codebooks" not in changed
    assert {"lm_head.weight", "visual_embedder.projector.1.weight"} <= changed
    assert (folder / "model" / "unitok" / "config.json").exists()


def test_a_trained_decoder_keeps_its_weights(mllm, root):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    # the text tokenizer has 512 ids, more than the decoder's 500: its embeddings are extended
    base = LlamaForCausalLM(LlamaConfig(vocab_size=500, max_position_embeddings=128, **sizes))
    base.save_pretrained(root / "decoder")
    folder = mllm.train(
        "decoder-run", "model.text={}", f"model.language_model={root}/decoder", "steps=1", "optimizer.lr=0"
    )
    model = UniTokForConditionalGeneration.from_pretrained(folder / "model")
    assert (
        len(model.get_input_embeddings().weight)
        >= UniTokProcessor.from_pretrained(folder / "model").vocab_size
    )
    for own, other in (
        (model.language_model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight),
        (model.lm_head.weight[:490], base.lm_head.weight),
        (model.get_input_embeddings().weight[:490], base.model.embed_tokens.weight),
    ):
        assert torch.equal(own, other[: len(own)])


def combined(text_sum, image_sum, targets, **options):
    """Loss, text loss and image loss as numbers, from sums over targets and their counts."""
    sums = {"text": torch.tensor(text_sum), "image": torch.tensor(image_sum)}
    counts = dict(zip(("text", "image"), targets))
    found = combine_losses(sums, counts, LossOptions(**options))
    assert list(found) == ["loss", "text_loss", "image_loss"]
    return [value.item() for value in found.values()]


def test_the_published_weighting_counts_every_code_as_one_token():
    ce, codes = 6.0 / 3, 8.0 / 16
    loss, text_loss, image_loss = combined(6.0, 8.0, (3, 16))
    assert loss == pytest.approx(codes * 16 / 19 + ce * 3 / 19)
    assert (text_loss, image_loss) == (ce, codes)
    means = combined(6.0, 8.0, (3, 16), weighting="means", text=0.5, image=2.0)
    assert means[0] == pytest.approx(0.5 * ce + 2 * codes)
    assert combined(0.0, 8.0, (0, 16))[0] == pytest.approx(codes)
    assert combined(6.0, 0.0, (3, 0), text=0.5)[0] == pytest.approx(ce)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda losses: {**losses, "depth": losses["text"]}, r"loss 'depth', but .* no weight loss\.depth"),
        (lambda losses: {"text": losses["text"]}, r"weight loss\.image, but .* no loss 'image'"),
    ],
)
def test_losses_and_weights_must_match_by_name(mllm, monkeypatch, change, message):
    losses = UniTokMLLMOutput.losses.fget
    monkeypatch.setattr(UniTokMLLMOutput, "losses", property(lambda output: change(losses(output))))
    with pytest.raises(UserError, match=message):
        mllm.train(f"unmatched-{message[:4]}")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["model=null"], "Give either `model`"),
        (["init_from=somewhere"], "Give either `model`"),
        (["model=null", "init_from=/nowhere"], "/nowhere does not exist"),
        (["model.text.hiden_size=8"], "hidden_size"),
        (["model.text.model_type=lama"], "not a decoder"),
        (["model.fields.visual_contex=full"], "visual_context"),
        (["model.processor.templat=plain"], "template"),
        (["model.processor.template=vicuna"], "vicuna_v1"),
        (["lr_factors={head: 1}"], "'head' is not a part"),
        (["data.mixture.0.kind=text2image"], "text_to_image"),
        (["data.max_length=500"], "context is 128"),
        (["batch_size=7", "engine.accumulation=2"], "batch_size 7"),
        (["loss={text: 0, image: 0}"], "not both 0"),
    ],
)
def test_error_messages(mllm, root, overrides, message):
    with pytest.raises(UserError, match=message):
        mllm.train(f"invalid-{message[:9]}", *overrides)
    assert not (root / f"invalid-{message[:9]}" / "model").exists()


def test_other_folders_are_rejected(mllm, root, reference, tmp_path):
    with pytest.raises(UserError, match="not an MLLM"):
        mllm.train("wrong-a", "model=null", f"init_from={root}/unitok")
    with pytest.raises(UserError, match="not a visual tokenizer"):
        # the folder of an MLLM stands for the tokenizer in it; here there is none
        (tmp_path / "bare").mkdir()
        shutil.copy(reference / "model" / "config.json", tmp_path / "bare")
        mllm.train("wrong-b", f"model.unitok={tmp_path}/bare")
    mllm.write_tokenizer(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="another visual tokenizer"):
        mllm.train("wrong-c", f"model.unitok={tmp_path}/other")


def test_sigterm_saves_and_the_same_command_resumes(mllm, reference, monkeypatch):
    add = MetricLogger.add

    def interrupted(self, step, values):
        add(self, step, values)
        if step == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MetricLogger, "add", interrupted)
        with pytest.raises(SystemExit) as left:
            mllm.train("terminated")
    assert left.value.code == 128 + signal.SIGTERM
    folder = mllm.folder / "terminated"
    assert [path.name for path in folder.glob("checkpoints/step-*")] == ["step-00000003"]
    mllm.train("terminated")
    assert mllm.rows(folder) == mllm.rows(reference)


def test_nan_stops_and_keeps_the_checkpoint(mllm, monkeypatch):
    def poisoned(sums, targets, options):
        found = combine_losses(sums, targets, options)
        steps.append(None)
        return {**found, "loss": found["loss"] * float("nan")} if len(steps) == 3 else found

    steps = []
    with monkeypatch.context() as patch:
        patch.setattr(train, "combine_losses", poisoned)
        with pytest.raises(UserError, match=r"Step 3 is not finite \(loss=nan, text_loss="):
            mllm.train("poisoned", "checkpoint.every=2")
    checkpoint = mllm.folder / "poisoned" / "checkpoints" / "step-00000002"
    UniTokForConditionalGeneration.from_pretrained(checkpoint)
    assert not (mllm.folder / "poisoned" / "model").exists()


def test_zero_3_shards_the_model_before_it_is_moved_to_its_device(mllm, monkeypatch):
    """No device holds the whole model at any time: parameters have no storage when the module is moved."""
    held = []
    original = UniTokForConditionalGeneration.to

    def to(self, *arguments, **options):
        held.append(sum(parameter.numel() for parameter in self.parameters()))
        return original(self, *arguments, **options)

    monkeypatch.setattr(UniTokForConditionalGeneration, "to", to)
    mllm.train("placed", "engine.zero_stage=3", "steps=1")
    assert held and not any(held)


def test_codes_of_the_wrong_mode_give_one_warning(mllm, tmp_path, capsys):
    shutil.copytree(mllm.folder / "codes", tmp_path / "codes")
    facts = json.loads((tmp_path / "codes" / "codes.json").read_text())
    assert facts["mode"] == "crop" and facts["oblong"] == 0
    (tmp_path / "codes" / "codes.json").write_text(json.dumps({**facts, "oblong": 3}))
    entries = ", ".join(
        f"{{kind: {kind}, path: {tmp_path}/codes}}"
        for kind in ("conversation", "conversation", "text_to_image")
    )
    mllm.train("notes", f"data.mixture=[{entries}]", "steps=2")
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("data: ")]
    assert len(notes) == 1 and "3 of 16 images were not square" in notes[0] and "--mode pad" in notes[0]
