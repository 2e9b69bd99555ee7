"""Conversion of published checkpoints in both directions: full-size names, files, CLIP weights, errors."""

import json
import math

import pytest
import torch
from transformers import PreTrainedModel

from open_unitok.cli.main import run as unitok
from open_unitok.core.errors import UserError
from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.tokenizer.convert import (
    codes_from_published,
    read_clip_weights,
    state_from_published,
    state_to_published,
    write_published_tokenizer,
)


@pytest.mark.parametrize("size", ["vitamin_base", "vitamin_large"])
def test_full_size_names_map_one_to_one(golden, size):
    listed = json.loads((golden / "tokenizer_full" / f"keys_{size}.json").read_text())
    published = {name: torch.empty(shape, device="meta") for name, shape in listed["keys"].items()}
    with torch.device("meta"):
        model = UniTok(UniTokConfig.named(size))
    state = model.state_dict()
    ours = state_from_published(published)
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in state.items()}
    back = state_to_published(state)
    assert {n: list(t.shape) for n, t in back.items()} == listed["keys"]
    count = sum(parameter.numel() for parameter in model.parameters()) + model.config.hidden_size
    assert count == listed["n_params_total"]  # the published count includes the position offset


def test_round_trip(published):
    back = state_to_published(state_from_published(published))
    assert back.keys() == published.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in published.items())


def test_published_file(variant, golden_folder, tiny_config):
    path = golden_folder / "reference_ckpt.pth"
    case = variant("attn")
    for model in (
        UniTok.from_reference(path, tiny_config()),
        UniTok.from_pretrained(path, config=tiny_config()),
    ):
        assert not model.training
        assert torch.equal(model.encode(case.out["image"]), codes_from_published(case.out["indices"]))
        assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
        assert model.quantizer.calls == 100
    with pytest.raises(UserError, match=r"model is 'vitamin_tiny_dev'.*Pass a config"):
        UniTok.from_reference(path)
    with pytest.raises(
        UserError, match=r"does not fit the config: text_encoder.* has shape \(512, 64\), expected \(99, 64\)"
    ):
        UniTok.from_reference(path, tiny_config(text_vocab_size=99))
    with pytest.raises(UserError, match="weights are missing"):
        UniTok.from_reference(path, tiny_config(num_hidden_layers=4))


def test_folder_or_hub_id_of_the_published_file(variant, golden_folder, tiny_config, tmp_path, monkeypatch):
    codes = codes_from_published(variant("attn").out["indices"])
    (tmp_path / "unitok_tokenizer.pth").symlink_to(golden_folder / "reference_ckpt.pth")
    model = UniTok.from_pretrained(tmp_path, config=tiny_config())
    assert torch.equal(model.encode(variant("attn").out["image"]), codes)

    def download(repository, name):
        assert (repository, name) == ("FoundationVision/unitok_tokenizer", "unitok_tokenizer.pth")
        return str(tmp_path / name)

    def no_config(*args, **kwargs):
        raise OSError("FoundationVision/unitok_tokenizer does not appear to have a file named config.json.")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", no_config)
    model = UniTok.from_pretrained("FoundationVision/unitok_tokenizer", config=tiny_config())
    assert torch.equal(model.encode(variant("attn").out["image"]), codes)
    with pytest.raises(
        UserError, match="nothing_here is neither a local path nor available from the hub: Found"
    ):
        UniTok.from_pretrained("nothing_here")


def test_named_size_is_read_from_the_file(tmp_path, monkeypatch):
    small = {"num_hidden_layers": 1, "codebook_size": 8, "text_num_layers": 1, "text_vocab_size": 32}
    from open_unitok.tokenizer import config, convert

    sizes = {
        "vitamin_nano": {
            "hidden_size": 64,
            "num_attention_heads": 2,
            "stem_width": 8,
            "stage_widths": (8, 16),
        }
    }
    sizes["vitamin_nano"] |= {"num_hidden_layers": 1, "decoder_widths": (16, 8)}
    monkeypatch.setattr(config, "TOKENIZER_SIZES", sizes)
    monkeypatch.setattr(convert, "TOKENIZER_SIZES", sizes)
    model = UniTok(UniTokConfig.named("vitamin_nano", num_register_tokens=1, projection="linear", **small))
    convert.write_published_tokenizer(model.config, model.state_dict(), tmp_path / "a.pth")
    loaded = UniTok.from_pretrained(tmp_path / "a.pth")
    assert loaded.config.to_dict() == model.config.to_dict()
    for name, tensor in model.state_dict().items():
        assert name == "quantizer.calls" or torch.equal(loaded.state_dict()[name], tensor), name


def test_invalid_files(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("code ran",))

    torch.save({"trainer": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth is not a checkpoint that can be read without"):
        UniTok.from_reference(tmp_path / "evil.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(UserError, match=r"text\.pth is not a checkpoint"):
        UniTok.from_reference(tmp_path / "text.pth")
    torch.save({"model": {}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth is not a published UniTok checkpoint"):
        UniTok.from_reference(tmp_path / "other.pth")
    with pytest.raises(UserError, match="is not an existing file"):
        UniTok.from_reference(tmp_path / "none.pth")
    with pytest.raises(UserError, match=r"'layers.0' is not a weight of a published UniTok"):
        state_from_published({"layers.0": torch.zeros(1)})


def test_command(variant, golden_folder, tiny_config, tmp_path, capsys):
    (tmp_path / "sizes.json").write_text(tiny_config().to_json_string())
    source, folder, file = golden_folder / "reference_ckpt.pth", tmp_path / "model", tmp_path / "back.pth"
    unitok(["convert", "tokenizer", str(source), str(folder), "--config", str(tmp_path / "sizes.json")])
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    image = variant("attn").out["image"]
    codes = UniTok.from_pretrained(folder).encode(image)
    assert torch.equal(codes, codes_from_published(variant("attn").out["indices"]))
    unitok(["convert", "tokenizer", str(folder), str(file)])
    original = torch.load(source, weights_only=True)["trainer"]["unitok"]
    back = torch.load(file, weights_only=True)["trainer"]["unitok"]
    assert original.keys() == back.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in original.items())
    with pytest.raises(UserError, match="already exists"):
        unitok(["convert", "tokenizer", str(source), str(folder)])


def test_init_from_clip(variant, tiny_config, tmp_path):
    weights = variant("attn").weights
    clip = {"logit_scale": torch.tensor(9.0), "visual.head.proj.weight": torch.zeros(3)}
    clip |= {"visual.trunk.fc_norm.weight": torch.zeros(64)}
    for name, tensor in weights.items():
        if name.startswith("encoder.") and not name.startswith("encoder.norm."):
            clip["visual.trunk." + name.removeprefix("encoder.")] = tensor
        if name.startswith("text_encoder."):
            clip["text." + name.removeprefix("text_encoder.")] = tensor
    torch.save(clip, tmp_path / "clip.pt")
    model = UniTok(tiny_config())
    clip_weights, missing = read_clip_weights(tmp_path / "clip.pt", model.state_dict())
    assert missing == ["encoder.norm.bias", "encoder.norm.weight"]
    model.load_state_dict(clip_weights, strict=False)
    state, expected = model.state_dict(), state_from_published(weights)
    for name in ("encoder.blocks.2.mlp.down.weight", "text_encoder.projection.weight", "encoder.pool.bias"):
        assert torch.equal(state[name], expected[name])
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert not model.encoder.position_offset.any()
    with pytest.raises(UserError, match="does not fit the config"):
        read_clip_weights(tmp_path / "clip.pt", UniTok(tiny_config(hidden_size=32)).state_dict())
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="not an open_clip ViTamin checkpoint"):
        read_clip_weights(tmp_path / "other.pt", model.state_dict())


@pytest.mark.parametrize(
    "changes",
    [
        {"quantizer": "nearest"},
        {"decoder_options": {"hidden_size": 32}},
        {"token_layout": {"rows": 4, "columns": 4}},
    ],
)
def test_configs_without_a_published_counterpart_are_rejected(tiny_config, tmp_path, changes):
    model = UniTok(tiny_config(**changes))
    with pytest.raises(UserError, match=f"{next(iter(changes))} = .* has no counterpart in a published file"):
        write_published_tokenizer(model.config, model.state_dict(), tmp_path / "a.pth")
    assert not list(tmp_path.iterdir())
