"""The published vitamin_base at full size, against outputs of the published code on formula weights."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.tokenizer.convert import codes_from_published, state_from_published

SEED = 1101


@pytest.mark.slow
def test_vitamin_base(golden, formula):
    folder = golden / "tokenizer_full"
    keys = json.loads((folder / "keys_vitamin_base.json").read_text())["keys"]
    with torch.device("meta"):
        model = UniTok(UniTokConfig.named("vitamin_base"))
    weights = {name: formula(name, tuple(shape), SEED) for name, shape in keys.items()}
    model.load_state_dict(state_from_published(weights), assign=True)
    model.eval()
    image = golden_image(formula("image", (1, 3 * 256 * 256), SEED) * (3 * 256 * 256) ** 0.5)
    out = load_file(folder / "vitamin_base.outputs.safetensors")
    with torch.no_grad():
        tokens = model.encoder(image)
        latents = model.encode_latents(image)
        codes = model.quantizer.encode(latents)
        expected = codes_from_published(out["indices"])
        sure = out["argmax_margin"].T[None] > 1e-4
        assert torch.equal(codes[sure], expected[sure]) and (~sure).sum() < 20
        hidden = model.up_project(model.quantizer.embed(expected))
        raw = model.decode_latents(model.quantizer.embed(expected), (16, 16))
        close = {"rtol": 0, "atol": 5e-5}
        torch.testing.assert_close(tokens[:, :4], out["encoder_tokens_first4"], **close)
        torch.testing.assert_close(tokens.mean(-1), out["encoder_tokens_mean"], **close)
        torch.testing.assert_close(latents, out["quant_proj_out"], **close)
        torch.testing.assert_close(hidden[:, :4], out["post_quant_first4"], **close)
        torch.testing.assert_close(raw[..., ::8, ::8], out["decoder_raw_stride8"], **close)
        torch.testing.assert_close(model._image_embedding(hidden), out["encode_image_norm"], **close)
        torch.testing.assert_close(model.embed_text(out["text"]), out["encode_text_norm"], **close)


def golden_image(noise: torch.Tensor) -> torch.Tensor:
    """Blocks of 16 pixels plus fine noise, from numbers of variance 1."""
    noise = noise.view(1, 3, 256, 256) / 3**0.5
    coarse = F.interpolate(F.avg_pool2d(noise, 16) * 8, scale_factor=16, mode="nearest")
    return (coarse + 0.3 * noise).clamp(-1, 1)
