"""Two encoders before a shared index: each makes its own block, which the decoders share."""

import pytest
import torch

from open_unitok.core.errors import UserError
from open_unitok.tokenizer import UniTok

VIT = {"encoder": "hf_vision", "model_type": "vit", "hidden_size": 24, "num_hidden_layers": 1}
VIT |= {"num_attention_heads": 2, "intermediate_size": 48}
SMALL = {"encoder": "vitamin", "num_hidden_layers": 1}
PYRAMID = {"quantizer": "residual", "quantizer_options": {"inner": "shared_index", "scales": [1, 2, 4]}}


@pytest.fixture
def build(tiny_config):
    """build(**changes of the config) -> a tiny tokenizer with two encoders."""

    def make(semantic=VIT, pixel=SMALL, **changes):
        torch.manual_seed(0)
        fields = {"encoder": "dual", "encoder_options": {"semantic": semantic, "pixel": pixel}}
        fields |= {"quantizer": "shared_index", "num_codebooks": 2, "codebook_dim": 8}
        fields |= {"quantizer_options": {"block_widths": [6, 2]}}
        return UniTok(tiny_config(**{**fields, **changes})).eval()

    return make


def pixels():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("projection", ["tanh", "attention"])
def test_each_encoder_makes_its_own_block(build, projection):
    """Of both books: a changed encoder changes its channels and no others."""
    model = build(projection=projection)
    assert model.encoder.width == 24 + 64 and model.quantizer.semantic_channels == [*range(6), *range(8, 14)]
    before = model.encode_latents(pixels())
    first, second = (p for p in model.down_projection.projections)
    blocks = [p(tokens) for p, tokens in zip((first, second), model.encoder(pixels()).split([24, 64], -1))]
    torch.testing.assert_close(before[..., :6], blocks[0][..., :6])
    torch.testing.assert_close(before[..., 6:8], blocks[1][..., :2])
    torch.testing.assert_close(before[..., 8:14], blocks[0][..., 6:])
    torch.testing.assert_close(before[..., 14:], blocks[1][..., 2:])
    for part, channels in (("semantic", model.quantizer.semantic_channels), ("pixel", [6, 7, 14, 15])):
        other = build(projection=projection)
        with torch.no_grad():
            for parameter in other.encoder.get_submodule(part).parameters():
                parameter.normal_(std=0.1)
        changed = (other.encode_latents(pixels()) != before).any(dim=(0, 1))
        assert changed.nonzero().flatten().tolist() == channels
        assert other.fingerprint() != model.fingerprint()


@pytest.mark.parametrize("pyramid", [False, True])
def test_the_pixel_decoder_reads_its_own_block(build, pyramid):
    """As published; no gradient of the pixels reaches the semantic encoder."""
    inner = {"block_widths": [6, 2], "decoded_blocks": [1]}
    options = {"inner": "shared_index", "inner_options": inner, "scales": [1, 2, 4]} if pyramid else inner
    model = build(quantizer="residual" if pyramid else "shared_index", quantizer_options=options)
    assert model.quantizer.decoded_channels == [6, 7, 14, 15]
    rows = model.quantizer.embed(model.encode(pixels()))
    other = rows.clone()
    other[..., model.quantizer.semantic_channels] += 1
    assert torch.equal(model.decode_latents(rows, (4, 4)), model.decode_latents(other, (4, 4)))
    other[..., 6] += 1
    assert not torch.equal(model.decode_latents(rows, (4, 4)), model.decode_latents(other, (4, 4)))
    model.train()(pixels()).reconstruction.square().mean().backward()
    assert not any(p.grad is not None and p.grad.any() for p in model.encoder.semantic.parameters())
    assert all(p.grad is not None for p in model.encoder.pixel.parameters())
    assert build().up_projection.linear.in_features == 16 and model.up_projection.linear.in_features == 4


def test_a_pyramid_takes_both(build):
    model = build(**PYRAMID, num_codebooks=1)
    assert model.encode(pixels()).shape == (2, 21, 1)
    assert model.down_projection.projections[0].linear.out_features == 4  # two halves
    codes = model.encode(pixels())
    assert torch.equal(model.quantizer.encode(model.encode_latents(pixels())), codes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantizer": "nearest", "quantizer_options": None}, r"makes 2 blocks of latents.*'nearest' has 1"),
        ({"quantizer_options": {"block_widths": [4, 2, 2]}}, r"has \[4, 2, 2\]: take 'shared_index' with 2"),
        ({"encoder_options": {"semantic": VIT}}, r"encoder_options\.pixel is None"),
        ({"encoder_options": {"semantic": VIT, "pixels": VIT}}, r"encoder_options\.pixels is not an option"),
        ({"semantic": {"encoder": "dual"}}, r"encoder_options\.semantic is"),
        ({"semantic": {**VIT, "projection": "mlp"}}, r"semantic\.projection is 'mlp'"),
        ({"semantic": {"encoder": "vit"}}, r"encoder 'vit' is not known"),
        ({"pixel": {**SMALL, "depth": 2}}, r"encoder_options\.depth is not an option of encoder 'vitamin'"),
        ({"semantic": {**VIT, "patch_size": 8}}, r"patches of 8 pixels, but patch_size = 16"),
        ({"num_register_tokens": 2}, r"one token per cell of the grid"),
        ({"adapter_layers": 1}, r"adapter_layers = 1: .* set it to 0"),
        ({"quantizer_options": {"block_widths": [6, 2], "decoded_blocks": [2]}}, r"decoded_blocks = \[2\]"),
        ({"quantizer_options": {"block_widths": [6, 2], "decoded_blocks": []}}, r"decoded_blocks = \[\]"),
    ],
)
def test_configs_that_are_refused(build, changes, message):
    with pytest.raises(UserError, match=message) as error:
        build(**changes)
    assert "\n" not in str(error.value)
