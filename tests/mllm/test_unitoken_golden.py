"""Dual input against golden vectors of UniToken: features behind the codes, adapter, losses, gradients.

The file's `published` rows learn the separator and keep the features of generated images; `task_switch` is
what the product builds.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from open_unitok.mllm import UniTokForConditionalGeneration, UniTokMLLMConfig

FEATURE, IGNORED = -201, -100
ADAPTER = ("0.weight", "0.bias", "2.weight", "2.bias")


@pytest.fixture(scope="module")
def files(golden):
    meta = json.loads((golden / "mllm" / "unitoken.meta.json").read_text())
    return meta, load_file(golden / "mllm" / "unitoken.safetensors")


@pytest.fixture(scope="module")
def model(files):
    """The golden decoder and adapter as our model; the visual embedder is not part of the file."""
    meta, found = files
    config = UniTokMLLMConfig(
        text_config={"model_type": "llama", **meta["fields"]},
        depth_config={"num_hidden_layers": 1},
        num_codebooks=2,
        codebook_size=4,
        codebook_dim=4,
        visual_hidden_size=16,
        num_image_tokens=found["places.in.visual"].shape[1],
        image_token_id=meta["places"]["code_place"],
        feature_token_id=meta["places"]["feature_place"],
        boi_token_id=meta["special"]["boi"],
        eoi_token_id=meta["special"]["eoi"],
        sep_token_id=meta["special"]["sep"],
        visual_input="dual",
        features={"source": "latents"},
        num_continuous_tokens=found["in.features"].shape[1],
        continuous_dim=found["in.features"].shape[2],
        text_z_loss_weight=meta["z_loss_weight"],
    )
    model = UniTokForConditionalGeneration(config)
    ours = {"lm_head.weight": found["weights.decoder.lm_head.weight"]}
    for name, tensor in found.items():
        if name.startswith("weights.decoder.model."):
            ours["language_model." + name.removeprefix("weights.decoder.model.")] = tensor
        elif name.startswith("weights.adapter."):
            ours["feature_adapter." + name.removeprefix("weights.adapter.")] = tensor
    loaded = model.load_state_dict(ours, strict=False)
    assert not loaded.unexpected_keys
    assert {name.partition(".")[0] for name in loaded.missing_keys} == {"visual_embedder", "depth_head"}
    return model.eval()


def close(found, expected, tolerance):
    difference = (found.detach() - expected).abs().max() / max(1.0, float(expected.abs().max()))
    assert difference < tolerance, float(difference)


def rows_of(files, mode):
    """input_ids, labels, attention_mask, image_features of a mode's rows, and the rows that have features."""
    _, found = files
    ids = found[f"{mode}.out.ids"]
    ids = torch.where(ids == -1, FEATURE, ids)
    has = (ids == FEATURE).any(dim=1)
    return ids, found[f"{mode}.out.labels"], found[f"{mode}.out.mask"], has


@pytest.mark.parametrize("mode", ["published", "task_switch", "discrete"])
def test_rows(files, model, mode):
    meta, found = files
    ids, labels, mask, has = rows_of(files, mode)
    features = found["in.features"].clone().requires_grad_(mode != "discrete")
    given = features[has] if bool(has.any()) else None
    model.zero_grad()
    close(model.embed_inputs(ids, image_features=given), found[f"{mode}.out.embeds"], 1e-6)
    # the file's logits come from a run without a mask
    out = model(input_ids=ids, image_features=given, labels=labels, attention_mask=torch.ones_like(mask))
    close(out.logits, found[f"{mode}.out.logits"], 2e-5)
    masked = model(input_ids=ids, image_features=given, labels=labels, attention_mask=mask)
    close(masked.logits[mask.bool()], out.logits[mask.bool()], 1e-6)
    expected = meta["modes"][mode]
    assert int(out.text_tokens) == expected["learnt_tokens"]
    assert float(out.loss) == pytest.approx(expected["total"], abs=1e-5)
    if mode == "discrete":
        return
    out.loss.backward()
    close(features.grad, found[f"{mode}.grad.features"], 2e-5)
    norms = features.grad.flatten(1).norm(dim=1).tolist()
    assert norms == pytest.approx(expected["grad_norm"]["features_per_row"], abs=2e-5)
    for name in ADAPTER:
        gradient = model.feature_adapter.get_parameter(name).grad
        close(gradient, found[f"{mode}.grad.adapter.{name}"], 2e-5)


def test_places(files, model, monkeypatch):
    """Codes at -200 and features at -201, with the file's vectors in the place of our visual embedder's."""
    meta, found = files
    visual = found["places.in.visual"].clone().requires_grad_()
    monkeypatch.setattr(model.visual_embedder, "forward", lambda codes: visual)
    codes = torch.zeros(*visual.shape[:2], 2, dtype=torch.long)
    ids, labels = found["places.in.ids"], found["places.in.labels"]
    given = {"image_codes": codes, "image_features": found["places.in.features"]}
    monkeypatch.setattr(model.config, "text_z_loss_weight", 0.0)
    model.zero_grad()
    close(model.embed_inputs(ids, **given), found["places.out.embeds"], 1e-6)
    out = model(input_ids=ids, labels=labels, **given, reduction="sum")
    close(out.logits, found["places.out.logits"], 2e-5)
    assert int(out.text_tokens) == meta["places"]["text_tokens"]
    assert float(out.text_loss) == pytest.approx(meta["places"]["text_loss_sum"], rel=1e-5)
    out.text_loss.backward()
    close(visual.grad, found["places.grad.visual"], 2e-5)
    for name in ("0.weight", "2.weight"):
        close(model.feature_adapter.get_parameter(name).grad, found[f"places.grad.adapter.{name}"], 2e-5)


def test_the_adapted_features(files, model):
    _, found = files
    with torch.no_grad():
        close(model.feature_adapter(found["in.features"]), found["out.adapted"], 1e-6)


def test_only_what_follows_sees_the_features(files, model):
    """Logits up to the separator do not depend on the features; those behind them do."""
    _, found = files
    ids, _, _, has = rows_of(files, "task_switch")
    features = found["in.features"][has]
    first = model(input_ids=ids, image_features=features).logits
    other = model(input_ids=ids, image_features=features.roll(1, dims=-1)).logits
    for row in range(len(ids)):
        places = (ids[row] == FEATURE).nonzero().flatten()
        start = int(places[0]) if len(places) else ids.shape[1]
        assert torch.equal(first[row, :start], other[row, :start])
        if len(places):
            assert float((first[row, int(places[-1]) :] - other[row, int(places[-1]) :]).abs().max()) > 0.1


def test_cached_equals_uncached(files, model):
    _, found = files
    ids, _, _, has = rows_of(files, "task_switch")
    features = found["in.features"][has]
    full = model(input_ids=ids, image_features=features).logits
    start = 20
    first = model(input_ids=ids[:, :start], image_features=features, use_cache=True)
    logits, cache = [first.logits], first.past_key_values
    for step in range(start, ids.shape[1]):
        out = model(input_ids=ids[:, step : step + 1], past_key_values=cache, use_cache=True)
        logits, cache = [*logits, out.logits], out.past_key_values
    close(torch.cat(logits, dim=1), full, 1e-5)
