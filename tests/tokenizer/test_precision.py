"""The precision policy: codes do not depend on dtype, autocast or matmul settings."""

import pytest
import torch

from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.precision import FLOAT32_PARTS


@pytest.fixture
def model(tiny_config) -> UniTok:
    torch.manual_seed(0)
    return UniTok(tiny_config()).eval()


def pixels(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_codes_are_float32_under_autocast(model):
    images = pixels(2, 3, 64, 64)
    with torch.no_grad():
        tokens = model.encoder(images)
        expected = model.quantizer(model.down_projection(tokens))
        model.encoder.forward = lambda _: tokens  # autocast may change only the encoder
        with torch.autocast("cpu", dtype=torch.bfloat16):
            latents = model.encode_latents(images)
            result = model.quantizer(latents, entropy=True)
            hidden = model.up_project(result.quantised)
            assert torch.equal(model.encode(images), expected.codes)
    assert latents.dtype == result.quantised.dtype == hidden.dtype == torch.float32
    assert torch.equal(result.codes, expected.codes)
    assert torch.equal(result.losses["vq"], expected.losses["vq"])


def test_codes_do_not_depend_on_the_matmul_precision(model):
    images = pixels(2, 3, 64, 64)
    with torch.no_grad():
        tokens = model.encoder(images)
    model.encoder.forward = lambda _: tokens
    expected = model.encode_latents(images)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(model.encode_latents(images), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("how", ["load", "to", "bfloat16", "half"])
def test_half_precision_keeps_float32_parts(model, tmp_path, how):
    if how == "load":
        model.save_pretrained(tmp_path)
        half = UniTok.from_pretrained(tmp_path, dtype=torch.bfloat16)
    else:
        half = UniTok(model.config)
        half.load_state_dict(model.state_dict())
        half = half.to(torch.bfloat16) if how == "to" else getattr(half, how)()
    assert half.encoder.norm.weight.dtype == (torch.float16 if how == "half" else torch.bfloat16)
    for part in FLOAT32_PARTS:
        for name, tensor in half.get_submodule(part).state_dict().items():
            assert torch.equal(tensor, model.get_submodule(part).state_dict()[name]), f"{part}.{name}"
    half.eval()
    codes = half.encode(pixels(1, 3, 64, 64))
    assert half.decode(codes).isfinite().all()
    assert half.embed_image(pixels(1, 3, 64, 64)).dtype == torch.float32
