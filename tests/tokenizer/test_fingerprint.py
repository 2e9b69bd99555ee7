"""The fingerprint: pinned values, and the tensors it depends on."""

import pytest
import torch

from open_unitok.core.files import SHIPPED_MODELS
from open_unitok.tokenizer import UniTok

# Models with seed 0; computed before quantisers and encoders were configurable.
PINNED = {
    "default": "61a37a4dc3728c5f733606cfa55a8cf93e5328114413f40a363b7ba080eeae26",
    "registers": "9342c70e07e29a7327e7e5b10e74e2942a031107a4fdf2968cbfdeb3854b4140",
    "linear": "0dc452f1530790d4abd2fe88b79c324d21606005962c0f0227744477adbb9410",
}
CHANGES = {"default": {}, "registers": {"num_register_tokens": 3}, "linear": {"projection": "linear"}}


def test_the_shipped_tokenizer_keeps_its_fingerprint():
    model = UniTok.from_pretrained(SHIPPED_MODELS / "scenes" / "unitok")
    assert model.fingerprint() == "e7be7719c83e9b18524b55b0aa19331f6f83be48f46a9d3b55f0bb9a9740f189"


@pytest.mark.parametrize("name", PINNED)
def test_seeded_models_keep_their_fingerprint(tiny_config, name):
    torch.manual_seed(0)
    model = UniTok(tiny_config(**CHANGES[name]))
    assert model.fingerprint() == PINNED[name]


def test_projection_options_change_the_fingerprint_but_no_tensor(tiny_config):
    def seeded(**changes) -> UniTok:
        torch.manual_seed(0)
        return UniTok(tiny_config(**changes)).eval()

    base = seeded()
    assert seeded(projection_heads=None, projection_causal=False).fingerprint() == base.fingerprint()
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    found = {base.fingerprint()}
    for changes in ({"projection_heads": 1}, {"projection_causal": True}):
        other = seeded(**changes)
        state = base.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())
        assert not torch.equal(other.encode_latents(pixels), base.encode_latents(pixels)), changes
        found.add(other.fingerprint())
    assert len(found) == 3


def test_only_tensors_that_determine_codes_are_hashed(tiny_config):
    model = UniTok(tiny_config())
    before = model.fingerprint()
    with torch.no_grad():
        model.decoder.to_pixels.weight.add_(1)
        model.quantizer.usage.add_(1)
    assert model.fingerprint() == before and len(before) == 64
    for tensor in (
        model.quantizer.codebooks,
        model.encoder.stem.conv1.bias,
        model.down_projection.linear.bias,
    ):
        with torch.no_grad():
            tensor.flatten()[0].add_(1e-3)
        assert model.fingerprint() != before
        before = model.fingerprint()
