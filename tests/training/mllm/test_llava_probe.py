"""The LLaVA probe with a tiny tokenizer: both stages, answers, a benchmark, and what is refused."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from open_unitok.cli.main import main, run
from open_unitok.core.errors import UserError
from open_unitok.generation import Pipeline
from open_unitok.mllm import UniTokForConditionalGeneration, UniTokMLLMConfig
from open_unitok.mllm.features import FeatureOptions, FeatureSource
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.images import load_image, to_pixels
from open_unitok.training.data.code_shards import CodeFolder
from open_unitok.training.mllm.model import build_parts
from open_unitok.training.mllm.train import build_mixture
from open_unitok.training.run import load_run_config

from ...eval.core.releases import vqav2

COLOURS = ("red", "blue", "brown", "black")
QUESTION = "What is the colour?"


def write_release(folder, rounds):
    """LLaVA's JSON of eight wide images, the mark before or behind the first question, and a text alone."""
    records = []
    for number in range(8):
        colour = COLOURS[number % 4]
        path = folder / "images" / f"part{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (48, 32), colour).save(path)
        first = f"{QUESTION}\n<image>" if number % 2 else f"<image>\n{QUESTION}"
        turns = [{"from": "human", "value": first}, {"from": "gpt", "value": f"a {colour} cat"}]
        turns += [{"from": "human", "value": "And again?"}, {"from": "gpt", "value": colour}] * (rounds - 1)
        records.append({"id": number, "image": f"part{number % 2}/{number}.png", "conversations": turns})
    if rounds > 1:
        text = [{"from": "human", "value": "Say fox."}, {"from": "gpt", "value": "fox"}]
        records.append({"id": "x", "model": "", "conversations": text})
    (folder / "release.json").write_text(json.dumps(records))


@pytest.fixture(scope="module")
def probe(mllm, mllm_reference, tmp_path_factory):
    """The folder of a probe: codes of both releases, two configs, and the runs of both stages."""
    folder = tmp_path_factory.mktemp("probe")
    for name, mode, rounds in (("captions", "crop", 1), ("instructions", "pad_grey", 2)):
        write_release(folder / name, rounds)
        release = [str(folder / name / "release.json"), str(folder / name / "tars")]
        run(["data", "convert", "llava", *release, "--images", str(folder / name / "images")])
        for out, features in (("codes", []), ("latents", ["--features", "latents"])):
            given = ["--tokenizer", str(mllm.folder / "unitok"), "--data", f"{folder / name}/tars/*.tar"]
            run(["extract-codes", *given, "--mode", mode, *features, "--out", str(folder / name / out)])
    plain = yaml.safe_load((mllm.folder / "config.yaml").read_text())
    first = load_run_config("configs/mllm/llava_probe_pretrain.yaml", [])
    second = load_run_config("configs/mllm/llava_probe_finetune.yaml", [])
    decoder = str(mllm_reference / "model")
    assert first.model is not None
    model = {
        "unitok": plain["model"]["unitok"], "language_model": decoder, "text_tokenizer": decoder,
        "depth": {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 1},
        "fields": first.model.fields, "processor": {**first.model.processor, "template": "plain"},
    }  # fmt: skip
    shared = {"stage": "mllm", "steps": 12, "batch_size": 8, "engine": {"threads": 1}, "log": {"every": 1}}
    shared |= {"checkpoint": {"every": 100}, "optimizer": {"lr": 1e-2}}
    configs = {
        "pretrain": {"model": model, "lr_factors": first.lr_factors},
        "finetune": {"init_from": str(folder / "pretrain" / "model"), "lr_factors": second.lr_factors},
    }
    for name, kind, codes in (
        ("pretrain", "alignment", "captions"),
        ("finetune", "conversation", "instructions"),
    ):
        mixture = [{"kind": kind, "path": str(folder / codes / "codes")}]
        data = {"mixture": mixture, "max_length": 100}
        config = {**shared, **configs[name], "out": str(folder / name), "data": data}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        run(["train", str(folder / f"{name}.yaml")])
    return folder


def stage_1(probe, *overrides):
    return load_run_config(str(probe / "pretrain.yaml"), list(overrides))


def weights(folder):
    return UniTokForConditionalGeneration.from_pretrained(folder / "model").state_dict()


def test_the_projector_has_the_published_size():
    """LayerNorm(1024), Linear(1024, 4096), GELU, Linear(4096, 4096)."""
    fields = {"visual_input": "continuous", "features": {"source": "quantised"}}
    fields |= {"num_continuous_tokens": 256, "continuous_dim": 1024}
    text = {"hidden_size": 4096, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 32}
    with torch.device("meta"):
        model = UniTokForConditionalGeneration(
            UniTokMLLMConfig(text_config=text, depth_config={"num_hidden_layers": 1}, **fields)
        )
    assert sum(p.numel() for p in model.feature_adapter.parameters()) == 20_981_760
    assert model.feature_adapter[0].eps == 1e-6


def test_the_first_stage_trains_the_projector_alone(mllm, mllm_reference, probe):
    before = build_parts(stage_1(probe)).model
    trained = {name for name, p in before.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in before.named_parameters() if n.startswith("feature_adapter.")}
    after, source = weights(probe / "pretrain"), weights(mllm_reference)
    for name, tensor in before.state_dict().items():
        assert torch.equal(after[name], tensor) != name.startswith("feature_adapter."), name
    # the language model is that of the given MLLM
    names = [name for name in source if name.startswith(("language_model.", "lm_head."))]
    assert names and all(torch.equal(after[name], source[name]) for name in names)
    records = mllm.rows(probe / "pretrain")
    assert records[-1]["text_loss"] < records[0]["text_loss"]


def test_gradients_of_the_first_stage_reach_the_projector_alone(probe):
    parts = build_parts(stage_1(probe))
    parts.model.train()
    batch = build_mixture(stage_1(probe), parts).next()[0]
    inputs = dict(batch.inputs)
    codes = inputs.pop("feature_codes")
    unitok = UniTok.from_pretrained(parts.unitok).eval()
    source = FeatureSource(FeatureOptions.from_config(parts.model.config.features, "continuous"), unitok)
    output = parts.model(**inputs, image_features=source.of_codes(codes))
    output.loss.backward()
    # images are never learned: only the captions and their ends are targets
    assert batch.code_targets == 0 and output.image_loss == 0 and output.image_codes == 0
    assert int(output.text_tokens) == batch.text_targets == int((inputs["labels"] >= 0).sum())
    places = inputs["input_ids"] == parts.model.config.feature_token_id
    assert int(places.sum()) == 8 * 4 and bool((inputs["labels"][places] == -100).all())
    for name, parameter in parts.model.named_parameters():
        has_gradient = parameter.grad is not None and bool(parameter.grad.any())
        assert has_gradient == name.startswith("feature_adapter."), name
    assert all(parameter.grad is None for parameter in unitok.parameters())


def test_the_second_stage_trains_projector_and_language_model(mllm, probe):
    before, after = weights(probe / "pretrain"), weights(probe / "finetune")
    moved = ("feature_adapter.", "language_model.", "lm_head.")
    for name in before:
        assert torch.equal(after[name], before[name]) != name.startswith(moved), name
    assert mllm.rows(probe / "finetune")[-1]["text_loss"] < mllm.rows(probe / "finetune")[0]["text_loss"]


@pytest.mark.parametrize("source", ["quantised", "latents"])
def test_features_do_not_depend_on_the_batch(mllm, source):
    unitok = UniTok.from_pretrained(mllm.folder / "unitok").eval()
    features = FeatureSource(FeatureOptions(source), unitok)
    pixels = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    together = features.encode(pixels)[1]
    alone = torch.cat([features.encode(pixels[i : i + 1])[1] for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    # quantised features are those of the tokenizer's decoder: looked-up rows, bidirectional projection
    if source == "quantised":
        codes = unitok.encode(pixels)
        assert torch.equal(together, unitok.up_project(unitok.quantizer.embed(codes)))
        attention = unitok.up_projection.attention
        width, latent = unitok.config.decoder_width, unitok.quantizer.latent_dim
        assert attention.heads == width // latent  # the rule of training, not the number of sub-codebooks
        first = codes.clone()
        first[:, -1] = (first[:, -1] + 1) % unitok.config.codebook_size
        # every feature depends on every code of its image
        assert not torch.allclose(features.of_codes(first)[:, 0], together[:, 0])


def test_code_folders_and_pixels_give_the_same_features(mllm, probe):
    unitok = UniTok.from_pretrained(mllm.folder / "unitok").eval()
    features = FeatureSource(FeatureOptions("quantised"), unitok)
    folder = CodeFolder(probe / "instructions" / "codes")
    for number in range(8):
        sample = folder.read(0, number)
        image = load_image(probe / "instructions" / "images" / f"part{number % 2}" / f"{number}.png")
        of_pixels = features.encode(to_pixels(image, 32, mode="pad_grey")[None])[1]
        codes = torch.from_numpy(sample.images[0].astype(np.int64))[None]
        assert torch.equal(features.of_codes(codes), of_pixels)


def test_it_answers_and_is_evaluated(probe, capsys):
    model = str(probe / "finetune" / "model")
    image = probe / "instructions" / "images" / "part0" / "0.png"
    pipe = Pipeline.from_pretrained(model)
    answers = pipe.answer([str(image)] * 2, [QUESTION, "And again?"], max_new_tokens=6)
    capsys.readouterr()
    main(["ask", str(image), QUESTION, "And again?", "--model", model, "--max-new-tokens", "6"])
    assert capsys.readouterr().out.splitlines()[-2:] == answers
    # the image is padded with grey and stands first
    assert pipe.processor.style.image_mode == "pad_grey"
    ids = pipe.processor.question_ids(f"{QUESTION}\n<image>")
    assert ids == pipe.processor.question_ids(QUESTION)
    assert ids.count(pipe.model.config.feature_token_id) == 4 and pipe.model.config.image_token_id not in ids
    vqav2(probe / "vqav2", llava=True)
    given = ["vqav2", "--data", str(probe / "vqav2"), "--model", model, "--out", str(probe / "eval")]
    main(["eval", "run", *given])
    result = json.loads((probe / "eval" / "vqav2" / "results.json").read_text())
    assert result["n"] == 5 and result["missing"] == 0 and result["complete"]


def test_latents_take_stored_features(mllm, probe):
    latents = "model.fields={visual_input: continuous, features: {source: latents}}"
    mixture = f"data.mixture=[{{kind: alignment, path: {probe}/captions/latents}}]"
    out = probe / "latents"
    run(["train", str(probe / "pretrain.yaml"), latents, mixture, f"out={out}", "steps=2"])
    model = UniTokForConditionalGeneration.from_pretrained(out / "model")
    assert model.config.continuous_dim == 12 and model.config.features["source"] == "latents"
    assert Pipeline.from_pretrained(out / "model").answer(
        [Image.new("RGB", (9, 7))], ["Why?"], max_new_tokens=2
    )


def refuse(probe, capsys, *overrides):
    """The one line that a run is refused with before its first batch."""
    out = probe / "refused"
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(probe / "pretrain.yaml"), f"out={out}", *overrides])
    assert stopped.value.code == 2 and not (out / "metrics.jsonl").exists()
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    return lines[0]


def test_wrong_input_is_refused_in_one_line(mllm, probe, capsys):
    latents = "model.fields={visual_input: continuous, features: {source: latents}}"
    line = refuse(probe, capsys, latents)
    assert "captions/codes have no features beside them" in line and "--features latents" in line
    mllm.write_tokenizer(probe / "other" / "unitok", seed=5)
    codes = mllm.write_codes(probe / "other", "codes", range(4), 1)
    mixture = f"data.mixture=[{{kind: conversation, path: {codes}}}]"
    assert "were made by another visual tokenizer" in refuse(probe, capsys, mixture)
    other = f"model.unitok={probe / 'other' / 'unitok'}"
    assert "were made by another visual tokenizer" in refuse(probe, capsys, other)
    assert "features.source = 'quantized'" in refuse(
        probe, capsys, "model.fields={visual_input: continuous, features: {source: quantized}}"
    )


def test_features_of_generated_images_are_refused(probe):
    model = UniTokForConditionalGeneration.from_pretrained(probe / "pretrain" / "model")
    config = model.config
    ids = torch.tensor([[1, config.boi_token_id, *[config.image_token_id] * 4, config.eoi_token_id]])
    given = {"input_ids": ids, "image_codes": torch.zeros(1, 4, 3, dtype=torch.long)}
    with pytest.raises(UserError, match="only images that are read have features"):
        model(**given, image_features=torch.zeros(1, 4, config.continuous_dim))
