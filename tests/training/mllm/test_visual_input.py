"""Training and answering with continuous and dual visual input, end to end with a tiny tokenizer."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.generation import Pipeline
from open_unitok.tokenizer import UniTok
from open_unitok.training.data.check import check_dataset
from open_unitok.training.data.code_shards import CodeFolder
from open_unitok.training.mllm import plan
from open_unitok.training.run import load_run_config


@pytest.fixture(scope="session")
def features(mllm, clip_folder):
    """source -> the folder of codes with its features, and the fields of a model that reads them."""
    made = {}

    def make(source, visual_input="dual"):
        options = {"source": source, **({"tower": str(clip_folder)} if source == "tower" else {})}
        if source not in made:
            given = () if source == "quantised" else ("--features", source)
            given += ("--tower", str(clip_folder)) if source == "tower" else ()
            made[source] = mllm.write_codes(mllm.folder, f"codes_{source}", range(16), 2, *given)
        mixture = [
            {"kind": "text_to_image", "path": made[source], "weight": 0.4},
            {"kind": "captioning", "path": made[source], "weight": 0.2},
            {"kind": "conversation", "path": made[source], "weight": 0.2},
            {"kind": "text", "path": str(mllm.folder / "text.txt"), "weight": 0.2},
        ]
        fields = {"visual_input": visual_input, "features": options}
        return [f"data.mixture={json.dumps(mixture)}", f"model.fields={json.dumps(fields)}"]

    return make


@pytest.fixture(scope="session")
def trained(mllm, features):
    """(source, visual_input) -> a run of two steps."""
    runs = {}

    def train(source, visual_input):
        name = f"{visual_input}_{source}"
        if name not in runs:
            runs[name] = mllm.train(name, *features(source, visual_input), "steps=2")
            assert all(np.isfinite(record["loss"]) for record in mllm.rows(runs[name]))
        return runs[name]

    return train


def images(count, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]


def test_stored_features_are_those_of_the_source(mllm, features):
    features("latents")
    unitok = UniTok.from_pretrained(mllm.folder / "unitok").eval()
    codes = CodeFolder(mllm.folder / "codes_latents")
    plain = CodeFolder(mllm.folder / "codes")
    for number in range(3):
        sample, other = codes.read(0, number), plain.read(0, number)
        assert np.array_equal(sample.codes, other.codes)
        (found,) = sample.features
        assert found.dtype == np.float16 and found.shape == (4, unitok.quantizer.latent_dim)
        again = unitok.quantizer.encode(torch.from_numpy(found.astype(np.float32))[None])
        # float16 may move a latent across a border between two entries
        assert (again[0].numpy() == sample.codes).mean() > 0.8


@pytest.mark.parametrize(
    ("source", "visual_input"),
    [
        ("latents", "dual"),
        ("quantised", "continuous"),
        pytest.param("tower", "dual", marks=pytest.mark.slow),
        pytest.param("encoder", "dual", marks=pytest.mark.slow),
        pytest.param("quantised", "dual", marks=pytest.mark.slow),
        pytest.param("tower", "continuous", marks=pytest.mark.slow),
        pytest.param("latents", "continuous", marks=pytest.mark.slow),
    ],
)
def test_train_and_answer(trained, source, visual_input):
    run = trained(source, visual_input)
    pipe = Pipeline.from_pretrained(run / "model")
    assert pipe.model.config.visual_input == pipe.processor.visual_input == visual_input
    read, questions = images(3), ["What is in this photo"] * 3
    answers = pipe.answer(read, questions, max_new_tokens=4)
    assert answers == [pipe.answer([image], [q], max_new_tokens=4)[0] for image, q in zip(read, questions)]
    pieces = list(pipe.answer_stream(read, questions, 4))
    assert answers == ["".join(piece[row] for piece in pieces) for row in range(3)]
    assert pipe.generate(["a red cat"])[0].size == (32, 32)


def test_training_reads_the_features_that_answering_computes(mllm, trained):
    """A conversation of the code folder, and its question to the pipeline, give the same input vectors."""
    pipe = Pipeline.from_pretrained(trained("latents", "dual") / "model")
    sample = CodeFolder(mllm.folder / "codes_latents").read(0, 0)
    with tarfile.open(mllm.folder / "codes_latents.tar") as tar:
        image = Image.open(io.BytesIO(tar.extractfile("0000.png").read()))
    read = pipe.encode_for_reading([image])
    assert np.array_equal(read.codes[0].numpy(), sample.codes)
    # one at a time or in a batch, an encoder differs by rounding
    np.testing.assert_allclose(read.features[0].numpy(), sample.features[0], rtol=2e-3, atol=2e-3)


def refuse(mllm, out, line, *overrides):
    with pytest.raises(UserError, match=line) as caught:
        mllm.train(out, *overrides)
    assert "\n" not in str(caught.value)
    assert not (mllm.folder / out / "metrics.jsonl").exists()  # before the first batch


def test_bad_features_are_refused_before_the_first_batch(mllm, features, clip_folder):
    given = features("latents")
    plain = given[0].replace("codes_latents", "codes")
    refuse(
        mllm, "none", r"codes have no features beside them, and the model reads .*'latents'", plain, given[1]
    )
    other = given[1].replace("latents", "encoder")
    refuse(
        mllm, "source", "are others than the model's .source latents, the model has encoder", given[0], other
    )
    # the same codes, and features of another encoder scale: codes.json of another tokenizer
    path = mllm.folder / "codes_latents" / "codes.json"
    stored = path.read_text()
    manifest = json.loads(stored)
    manifest["features"]["fingerprint"] = "0" * 64
    path.write_text(json.dumps(manifest))
    refuse(mllm, "another", "are others than the model's .fingerprint 000000000000, the model has", *given)
    manifest["features"] = ["latents"]
    path.write_text(json.dumps(manifest))
    refuse(mllm, "damaged", "codes.json is damaged", *given)
    path.write_text(stored)
    refuse(mllm, "tower", "features.source = 'tower' with features.tower = None", given[0],
           'model.fields={"visual_input": "dual", "features": {"source": "tower"}}')  # fmt: skip
    refuse(
        mllm, "part", "has no feature_adapter: its visual_input is 'discrete'", "lr_factors.feature_adapter=2"
    )
    factors = "lr_factors={language_model: 0, lm_head: 0, visual_embedder: 0, depth_head: 0}"
    refuse(mllm, "frozen", "nothing is left to train", factors)
    refuse(mllm, "typo", "features.sorce is not an option", given[0],
           'model.fields={"visual_input": "dual", "features": {"sorce": "latents"}}')  # fmt: skip


def test_only_folders_whose_images_are_read_need_features(mllm, features):
    given = features("latents")
    mixture = [
        {"kind": "text_to_image", "path": str(mllm.folder / "codes")},
        {"kind": "captioning", "path": str(mllm.folder / "codes_latents")},
    ]
    mllm.train("apart", f"data.mixture={json.dumps(mixture)}", given[1], "steps=1")
    # a share of text_to_image becomes captioning, which reads
    refuse(mllm, "share", "have no features", f"data.mixture={json.dumps(mixture)}", given[1],
           "data.text_to_image_share=0.5")  # fmt: skip


def test_extraction_is_checked(mllm, features, clip_folder):
    features("latents")
    out = str(mllm.folder / "codes_latents")
    with pytest.raises(UserError, match=r"holds codes of another extraction \(features"):
        mllm.write_codes(mllm.folder, "codes_latents", range(16), 2, "--features", "encoder")
    with pytest.raises(UserError, match=r"holds codes of another extraction \(features"):
        mllm.write_codes(mllm.folder, "codes_latents", range(16), 2)
    with pytest.raises(UserError, match="takes the folder or hub id of a vision model"):
        mllm.write_codes(mllm.folder, "unmade", range(2), 1, "--features", "tower")
    with pytest.raises(UserError, match="takes the folder or hub id of a vision model"):
        mllm.write_codes(
            mllm.folder, "unmade", range(2), 1, "--features", "latents", "--tower", str(clip_folder)
        )
    report = check_dataset(out, quiet=True)
    assert not report.broken and "features of latents, 4 x 12" in report.lines[0]


def test_a_model_of_another_tokenizers_features_is_refused(mllm, features, trained, tmp_path):
    run = trained("quantised", "continuous")
    shutil.copytree(run / "model", tmp_path / "model")
    unitok = UniTok.from_pretrained(tmp_path / "model" / "unitok")
    with torch.no_grad():
        next(unitok.up_projection.parameters()).mul_(2)  # codes stay, features change
    unitok.save_pretrained(tmp_path / "model" / "unitok")
    with pytest.raises(UserError, match=r"the model was trained on features \(quantised\) of"):
        Pipeline.from_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"the model was trained on features \(quantised\) of"):
        mllm.train(
            "other_features", *features("quantised")[:1], "model=null", f"init_from={tmp_path / 'model'}"
        )
    path = tmp_path / "model" / "processor_config.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps({**described, "num_continuous_tokens": 3}))
    with pytest.raises(UserError, match="num_continuous_tokens = 4 in"):
        Pipeline.from_pretrained(tmp_path / "model")


@pytest.mark.slow
def test_stages_by_lr_factors(mllm, features):
    """The adapter alone, then all, from the first stage's folder."""
    alone = "lr_factors={language_model: 0, lm_head: 0, visual_embedder: 0, depth_head: 0}"
    given = features("quantised", "continuous")
    talks = f'data.mixture=[{{"kind": "alignment", "path": "{mllm.folder}/codes"}}]'
    first = mllm.train("stage1", talks, given[1], alone, "steps=2")
    second = mllm.train("stage2", talks, "model=null", f"init_from={first / 'model'}", "steps=2")
    zero = mllm.train("stage0", talks, given[1], alone, "steps=1")
    start, middle, end = (mllm.weights(run) for run in (zero, first, second))
    assert {n for n in end if not torch.equal(start[n], middle[n])} == {
        n for n in end if n.startswith("feature_adapter")
    }
    assert not torch.equal(middle["language_model.layers.0.mlp.up_proj.weight"],
                           end["language_model.layers.0.mlp.up_proj.weight"])  # fmt: skip


@pytest.mark.slow
def test_a_resumed_run_continues_the_curve(mllm, features):
    given = features("latents")
    whole = mllm.train("dual_whole", *given, "steps=4")
    mllm.train("dual_resumed", *given, "steps=4", "stop_at=2")
    resumed = mllm.train("dual_resumed", *given, "steps=4")
    assert mllm.rows(resumed) == mllm.rows(whole)


def test_the_plan_counts_the_features(mllm, features):
    given = features("latents")
    config = load_run_config(str(mllm.folder / "config.yaml"), given)
    found = plan.plan_run(config, gpus=1)
    assert found.parameters["feature_adapter"] == (12 * 32 + 32 + 32 * 32 + 32,) * 2
    # 40 % of the samples read an image of 4 + 1 + 4 tokens, 40 % generate one of 4
    assert found.counts.feature_tokens == pytest.approx(8 * 0.4 * 4)
    assert found.counts.image_tokens == pytest.approx(8 * 0.8 * 4)
