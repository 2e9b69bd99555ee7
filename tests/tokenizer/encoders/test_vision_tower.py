"""Vision towers of transformers, from folders: against transformers' own outputs, saved, frozen, refused."""

import json

import huggingface_hub.constants
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, BertConfig, BertModel, CLIPConfig, CLIPModel

from open_unitok.core.errors import UserError
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.encoders.vision_tower import (
    VisionTower,
    load_projected_tower,
    load_tower,
    read_tower,
    tower_sizes,
)

SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
SIZES |= {"image_size": 64, "patch_size": 16}
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
# model type -> number of tokens before the patches
TOWERS = {"clip_vision_model": 1, "siglip_vision_model": 0, "dinov2": 1, "dinov2_with_registers": 5}
TOWERS |= {"dinov3_vit": 1, "vit": 1}


def make(folder, kind, seed=0, **changes):
    """A tiny random tower with its preprocessor in a folder; returns the folder."""
    torch.manual_seed(seed)
    if kind == "clip":
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        text |= {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
        model = CLIPModel(CLIPConfig(vision_config=SIZES | changes, text_config=text, projection_dim=12))
    else:
        config = VisionTower({"model_type": kind, **SIZES, **changes}).tower.config
        model = AutoModel.from_config(config)
    for parameter in model.parameters():  # norms that are not the identity
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    normal = {"image_mean": MEAN, "image_std": STD, "image_processor_type": "CLIPImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(normal))
    return folder


def pixels(height=64, width=64):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def normalised(image):
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    return ((image + 1) / 2 - mean) / std


def theirs(folder, image):
    """transformers' own output for pixels, all hidden states included."""
    model = AutoModel.from_pretrained(folder).eval()
    model = getattr(model, "vision_model", model)
    more = {} if "dinov" in model.config.model_type else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        return model, model(pixel_values=normalised(image), output_hidden_states=True, **more)


@pytest.mark.parametrize("kind", [*TOWERS, "clip"])
@pytest.mark.parametrize("shape", [(64, 64), (32, 48)])
def test_tokens_are_those_of_transformers(tmp_path, kind, shape):
    """All layers, at the size it was trained with and at another, which resizes its positions."""
    make(tmp_path, kind)
    image, first = pixels(*shape), TOWERS.get(kind, 1)
    model, out = theirs(tmp_path, image)
    norm = next(getattr(model, n) for n in ("post_layernorm", "layernorm", "norm") if hasattr(model, n))
    states = [*out.hidden_states[:-1], None]
    for layer, final, expected in [
        (None, None, out.last_hidden_state),
        (-2, None, states[-2]),
        (-2, True, norm(states[-2])),
    ]:
        found = load_tower(str(tmp_path), layer=layer, norm=final)(image)
        torch.testing.assert_close(found, expected[:, first:], rtol=1e-5, atol=1e-5)
        assert found.shape == (2, shape[0] * shape[1] // 256, 24)
    last, normed = (load_tower(str(tmp_path), layer=-1, norm=n)(image) for n in (None, True))
    torch.testing.assert_close(norm(last), normed, rtol=1e-5, atol=1e-5)
    layers = load_tower(str(tmp_path)).layer_outputs(image)
    assert len(layers) == 3
    torch.testing.assert_close(layers[0], out.hidden_states[1][:, first:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layers[-1], out.last_hidden_state[:, first:], rtol=1e-5, atol=1e-5)
    if kind in ("clip", "clip_vision_model"):  # its final norm is for the class token
        torch.testing.assert_close(last, out.last_hidden_state[:, 1:], rtol=1e-5, atol=1e-5)


def test_the_projection_of_a_clip(tmp_path):
    clip = CLIPModel.from_pretrained(make(tmp_path, "clip")).eval()
    with torch.no_grad():
        out = clip.vision_model(pixel_values=normalised(pixels()))
        expected = clip.visual_projection(clip.vision_model.post_layernorm(out.last_hidden_state))
    tower = load_projected_tower(str(tmp_path))
    assert tower.width == 12
    torch.testing.assert_close(tower(pixels()), expected[:, 1:], rtol=1e-5, atol=1e-5)


def test_sizes_and_fingerprints(tmp_path):
    folder = str(make(tmp_path, "siglip_vision_model", patch_size=14, image_size=62))
    tower = load_tower(folder)
    assert tower.image_size == 56 and tower_sizes(folder) == (16, 24)  # 6 pixels are left over
    assert tower(pixels(), size=(56, 56)).shape == (2, 16, 24)
    prints = {tower.fingerprint(), load_tower(folder).fingerprint()}
    assert len(prints) == 1
    next(tower.parameters()).data[0] += 1
    prints |= {tower.fingerprint(), load_tower(folder, mean=[0.5] * 3).fingerprint()}
    assert len(prints) == 3


@pytest.mark.parametrize("kind", ["clip", "siglip_vision_model", "dinov2_with_registers", "dinov3_vit"])
def test_a_tokenizer_takes_over_a_tower(tiny_config, tmp_path, kind):
    """A folder of its own that loads without the tower's; gradients; the fingerprint covers the options."""
    folder = make(tmp_path / "tower", kind)
    config = tiny_config(encoder="hf_vision", encoder_options={"path": str(folder), "layer": -2})
    torch.manual_seed(0)
    model = UniTok(config)
    assert config.encoder_options["path"] and "path" not in model.config.encoder_options
    tokens = load_tower(str(folder), layer=-2)(pixels())
    torch.testing.assert_close(model.encoder(pixels()), tokens, rtol=1e-6, atol=1e-6)
    out = model.train()(pixels(), torch.randint(0, 512, (2, 5)))
    similarity = (out.logit_scale * out.image_embeds @ out.text_embeds.T).logsumexp(-1).sum()
    (out.reconstruction.square().mean() + sum(out.losses.values()) + similarity).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    model.eval().save_pretrained(tmp_path / "model")
    folder.rename(tmp_path / "elsewhere")
    loaded = UniTok.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.encoder(pixels()), model.encoder(pixels()))
    assert loaded.fingerprint() == model.fingerprint()
    assert loaded.encode(pixels(32, 48)).shape == (2, 6, 4)
    half = UniTok.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    difference = half.encoder(pixels().bfloat16()).float() - model.encoder(pixels())
    assert half.encoder(pixels().bfloat16()).dtype == torch.bfloat16 and difference.abs().mean() < 0.05
    prints = {model.fingerprint()}
    for change in ({"mean": [0.5] * 3, "std": [0.5] * 3}, {"norm": True}):
        other = tiny_config(encoder="hf_vision", encoder_options=model.config.encoder_options | change)
        other = UniTok(other)
        other.load_state_dict(model.state_dict(), strict=False)
        prints.add(other.fingerprint())
    assert len(prints) == 3


def test_a_frozen_tower_stays_in_evaluation_mode(tiny_config, tmp_path):
    fields = {"model_type": "vit", **SIZES, "hidden_dropout_prob": 0.5}
    model = UniTok(tiny_config(encoder="hf_vision", encoder_options=fields))
    assert not torch.equal(model.train().encoder(pixels()), model.encoder(pixels()))
    model.encoder.requires_grad_(False)
    assert torch.equal(model.train().encoder(pixels()), model.encoder(pixels())) and model.training
    # a folder's own dropout is left out: training samples by image
    assert read_tower(str(make(tmp_path, "vit", hidden_dropout_prob=0.5)))["hidden_dropout_prob"] == 0


def test_another_patch_size_resizes_the_image(tiny_config, tmp_path):
    """A tower of patches of 14 behind tokens of 16 pixels."""
    folder = make(tmp_path, "dinov2", patch_size=14, image_size=56)
    options = {"path": str(folder)}
    with pytest.raises(UserError, match=r"14 pixels, but patch_size = 16: .* or encoder_options\.resize"):
        UniTok(tiny_config(encoder="hf_vision", encoder_options=options))
    model = UniTok(tiny_config(encoder="hf_vision", encoder_options=options | {"resize": True}))
    assert model.encoder.patch_size == 16 and model.encoder.tower_patch == 14
    smaller = F.interpolate(pixels(), (56, 56), mode="bicubic", antialias=True).clamp(-1, 1)
    tokens = load_tower(str(folder))(smaller)
    torch.testing.assert_close(model.encoder(pixels()), tokens, rtol=1e-6, atol=1e-6)
    assert model.encode(pixels(32, 48)).shape == (2, 6, 4)
    with pytest.raises(UserError, match="multiples of 16"):
        model.encode(pixels(64, 60))
    with pytest.raises(UserError, match="patches of 14 pixels cannot read images of 64 x 64"):
        load_tower(str(folder))(pixels())


def broken(tmp_path, case):
    """A folder that is not a usable tower."""
    if case == "text":
        BertModel(BertConfig(**{k: SIZES[k] for k in list(SIZES)[:4]}, vocab_size=9)).save_pretrained(
            tmp_path
        )
        return tmp_path
    make(tmp_path, "dinov2")
    if case == "missing":
        weights = tmp_path / "model.safetensors"
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        del tensors["encoder.layer.1.norm1.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    if case == "weights":
        (tmp_path / "model.safetensors").unlink()
    if case == "truncated":
        (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:500])
    if case == "processor":
        (tmp_path / "preprocessor_config.json").unlink()
    if case == "scaled":
        (tmp_path / "preprocessor_config.json").write_text(
            json.dumps({"image_mean": MEAN, "image_std": STD, "rescale_factor": 1 / 127.5})
        )
    return tmp_path


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        ("text", {}, r"'bert' is not a vision tower"),
        ("missing", {}, r"encoder_options\.path \(.*\) lacks weights, encoder\.layer\.1\.norm1\.weight"),
        ("weights", {}, r"cannot be loaded: .*no file named"),
        ("truncated", {}, r"cannot be loaded"),
        ("processor", {}, r"set encoder_options\.mean and encoder_options\.std"),
        ("scaled", {}, r"set encoder_options\.mean and encoder_options\.std"),
        ("good", {"layer": -4}, r"encoder_options\.layer is -4: this network has 3 blocks, -1 to -3"),
        ("good", {"layer": 1}, r"encoder_options\.layer is 1"),
        ("good", {"std": [0.0, 1.0, 1.0]}, r"std above 0"),
        ("good", {"hidden_size": 8}, r"encoder_options\.hidden_size is not an option of encoder 'hf_vision'"),
    ],
)
def test_folders_that_are_refused(tiny_config, tmp_path, case, options, message):
    options = {"path": str(broken(tmp_path, case)), **options}
    with pytest.raises(UserError, match=message) as error:
        UniTok(tiny_config(encoder="hf_vision", encoder_options=options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "nowhere"}, r"encoder_options\.path is 'nowhere', but there is no such folder"),
        (None, r"'hf_vision' needs encoder_options\.path"),
        ({"path": None}, r"'hf_vision' needs encoder_options\.path"),
        ("nowhere", r"encoder_options is 'nowhere': expected options by name"),
        ({"path": "nobody/tower"}, r"nobody/tower cannot be loaded"),  # tests have no network
        ({"model_type": "bert"}, r"'bert' is not a vision tower"),
        (
            {"model_type": "siglip2_vision_model", **SIZES},
            r"reads pixel_attention_mask, spatial_shapes as well",
        ),
        ({"model_type": "vit_mae", **SIZES}, r"for 16 patches: it is not a vision transformer with a token"),
        ({"model_type": "convnext"}, r"'convnext' is not a vision transformer with one patch size"),
        (
            {"model_type": "aimv2_vision_model", **SIZES, "image_size": 32},
            r"'aimv2_vision_model' cannot encode images of 64 x 64 pixels",
        ),
    ],
)
def test_networks_that_are_no_towers(tiny_config, options, message, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message) as error:
        UniTok(tiny_config(encoder="hf_vision", encoder_options=options))
    assert "\n" not in str(error.value)


def test_a_saved_tokenizer_with_a_path_is_refused(tiny_config, tmp_path):
    UniTok(tiny_config()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"encoder": "hf_vision", "encoder_options": {"path": "elsewhere"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match="encoder_options has a path, but a saved tokenizer holds its own tower"
    ):
        UniTok.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mean": 0.5}, "mean"),
        ({"mean": [float("nan")] * 3}, "mean"),
        ({"std": [0, 0, 0]}, "std"),
        ({"std": [float("inf")] * 3}, "std"),
        ({"norm": "no"}, "norm"),
        ({"resize": "no"}, "resize"),
        ({"layer": -2}, "layer"),  # of a path alone
        ({"hidden_siz": 32}, "Did you mean 'hidden_size'"),
        ({"hidden_size": 0}, "build no tower"),
    ],
)
def test_wrong_options_of_a_new_tower_are_refused(tiny_config, changes, named):
    options = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1}
    options |= {"num_attention_heads": 2, "intermediate_size": 32}
    with pytest.raises(UserError, match=named) as refusal:
        UniTok(tiny_config(encoder="hf_vision", encoder_options=options | changes))
    assert "\n" not in str(refusal.value)
