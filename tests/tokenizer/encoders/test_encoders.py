"""The encoder and decoder interface; training/tokenizer/encoders/test_every_encoder.py runs every entry."""

import pytest
import torch

from open_unitok.core.errors import UserError
from open_unitok.tokenizer import UniTok

VIT = {"model_type": "vit", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT |= {"intermediate_size": 48}
DINOV2 = {"model_type": "dinov2", "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
SIGLIP = {**VIT, "model_type": "siglip_vision_model"}
OPTIONS = {"vitamin": [None], "hf_vision": [VIT, DINOV2, SIGLIP]}


def pixels(height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(("name", "options"), [(name, o) for name in OPTIONS for o in OPTIONS[name]])
def test_every_encoder_trains_saves_and_loads(tiny_config, tmp_path, name, options):
    torch.manual_seed(0)
    model = UniTok(tiny_config(encoder=name, encoder_options=options))
    assert model.encoder.patch_size == 16 and model.decoder.patch_size == 16
    assert model.encoder(pixels()).shape == (2, 16, model.encoder.width)
    out = model.train()(pixels(), torch.randint(0, 512, (2, 5)), entropy=True)
    similarity = (out.logit_scale * out.image_embeds @ out.text_embeds.T).logsumexp(-1).sum()
    (out.reconstruction.square().mean() + sum(out.losses.values()) + similarity).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
    model.eval().save_pretrained(tmp_path)
    loaded = UniTok.from_pretrained(tmp_path)
    codes = model.encode(pixels())
    assert torch.equal(loaded.encode(pixels()), codes)
    assert torch.equal(loaded.decode(codes), model.decode(codes))
    assert loaded.fingerprint() == model.fingerprint()
    assert model.encode(pixels(32, 48)).shape == (2, 6, 4)
    half = UniTok.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.decode(half.encode(pixels())).isfinite().all()


def test_tokens_are_in_raster_order(tiny_config):
    """A changed patch changes its own token most, also in towers that put a CLS token first."""
    for options in OPTIONS["hf_vision"]:
        torch.manual_seed(0)
        encoder = UniTok(tiny_config(encoder="hf_vision", encoder_options=options)).eval().encoder
        changed = pixels()
        changed[:, :, 16:32, 48:64] *= -1  # row 1, column 3
        with torch.no_grad():
            difference = (encoder(changed) - encoder(pixels())).norm(dim=-1)
        assert difference.argmax(dim=-1).tolist() == [7, 7], options["model_type"]


def test_fingerprints_differ_between_encoders(tiny_config):
    kinds = [{}, {"encoder_options": {"num_hidden_layers": 2}}]
    kinds += [{"encoder": "hf_vision", "encoder_options": VIT | {"num_attention_heads": n}} for n in (2, 4)]
    found = set()
    for changes in kinds:
        torch.manual_seed(0)
        found.add(UniTok(tiny_config(**changes)).fingerprint())
    assert len(found) == len(kinds)  # the number of heads changes no tensor, but the options are hashed


def test_encoder_and_decoder_may_have_different_sizes(tiny_config, tmp_path):
    small = {"hidden_size": 32, "num_hidden_layers": 1, "stage_depths": [1, 1], "stem_width": 8}
    model = UniTok(tiny_config(encoder_options=small, decoder_options={"hidden_size": 48})).eval()
    assert (model.encoder.width, len(model.encoder.blocks)) == (32, 1)
    assert model.encoder.stem.conv1.out_channels == 8
    assert (model.decoder.width, len(model.decoder.blocks)) == (48, 3)
    assert model.up_project(torch.zeros(1, 4, 16)).shape == (1, 4, 48)
    assert model(pixels()).reconstruction.shape == (2, 3, 64, 64)
    model.save_pretrained(tmp_path)
    codes = model.encode(pixels())
    assert torch.equal(UniTok.from_pretrained(tmp_path).decode(codes), model.decode(codes))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"encoder": "hf_visoin"}, r"encoder 'hf_visoin' is not known: ENCODERS has vitamin, hf_vision, "),
        ({"decoder": "pixels"}, r"decoder 'pixels' is not known: DECODERS has vitamin, "),
        ({"encoder_options": {"hiden_size": 8}}, r"encoder_options\.hiden_size is not.*'hidden_size'"),
        ({"decoder_options": {"stem_width": 8}}, r"decoder_options\.stem_width is not an option of decoder"),
        (
            {"decoder_options": {"hidden_size": 33}, "projection_heads": 1},
            r"decoder: hidden_size = 33 is not a multiple of",
        ),
        ({"patch_size": 8}, r"'vitamin' has patches of 16 pixels, but patch_size = 8"),
        ({"encoder": "hf_vision"}, r"'hf_vision' needs encoder_options\.path, .* or model_type"),
        ({"encoder": "hf_vision", "encoder_options": VIT, "num_register_tokens": 2}, r"no register tokens"),
        ({"encoder": "hf_vision", "encoder_options": VIT | {"patch_size": 8}}, r"patches of 8 pixels"),
    ],
)
def test_errors_name_the_registry(tiny_config, wrong, message):
    with pytest.raises(UserError, match=message):
        UniTok(tiny_config(**wrong))
