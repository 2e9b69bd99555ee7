"""The quantiser interface, for every entry of QUANTIZERS."""

import numpy as np
import pytest
import torch

from open_unitok.core.errors import UserError
from open_unitok.tokenizer import QUANTIZERS, UniTok, code_dtype
from open_unitok.tokenizer.quantizers import (
    AttentionQuantizer,
    IBQQuantizer,
    NearestQuantizer,
    build_quantizer,
)
from open_unitok.tokenizer.quantizers.base import Quantizer, normalise_blocks
from open_unitok.tokenizer.token_layout import TokenLayout

ONE_GRID = sorted(set(QUANTIZERS) - {"residual", "none"})  # a pyramid, no codes: tests of their own
OPTIONS = {"residual": {"scales": [1, 2, 4]}, "gaussian": {"levels": [8, 8, 4, 2, 2]}}  # in `tiny_config`

# SweetTok's codes are added, Gaussians' too, and a package's need options: quantizers/test_language.py, ...
CONCATENATED = sorted(set(ONE_GRID) - {"language", "library", "gaussian"})
WITH_ROWS = sorted(set(CONCATENATED) - {"language_map"})  # rows of an own parameter
SIZES = {
    "language": {"num_codebooks": 3, "codebook_dim": 8},
    "gaussian": {"num_codebooks": 6, "codebook_dim": 8},
}


@pytest.fixture(params=CONCATENATED)
def quantizer(request) -> Quantizer:
    torch.manual_seed(0)
    return QUANTIZERS[request.param](3, 32, 4)


def test_shapes_and_dtypes(quantizer):
    latents = torch.randn(2, 5, quantizer.latent_dim)
    assert (quantizer.latent_dim, quantizer.code_sizes) == (12, [32, 32, 32])
    assert quantizer.num_tokens(TokenLayout(2, 3, registers=1)) == 7
    out = quantizer(latents)
    assert out.codes.shape == (2, 5, 3) and out.codes.dtype == torch.int64
    assert out.quantised.shape == (2, 5, 12) and out.quantised.dtype == torch.float32
    assert out.usage.shape == (3,) and quantizer.calls == 1
    assert all(loss.ndim == 0 for loss in out.losses.values())
    if not quantizer.moves_rows:  # otherwise the rows have moved since
        assert torch.equal(quantizer.encode(latents), out.codes)
    if type(quantizer) is not QUANTIZERS["nearest_ema"]:  # whose output has the rows before the step
        torch.testing.assert_close(quantizer.embed(out.codes), out.quantised, rtol=0, atol=1e-6)
    assert quantizer.split(latents).shape == (2, 5, 3, 4)


def test_embed_is_a_lookup_in_the_code_table(quantizer):
    """As the MLLM embeds codes: rows by index, normalised by `row_norm`, concatenated."""
    codes = torch.randint(32, (2, 5, 3))
    table = quantizer.code_table()
    assert table.shape == (3, 32, 4) and table.dtype == torch.float32
    rows = torch.stack([table[k][codes[..., k]] for k in range(3)], dim=-2)
    if quantizer.row_norm == "blocks":
        rows = normalise_blocks(rows, quantizer.row_blocks)
    elif quantizer.row_norm == "unit":
        rows = torch.nn.functional.normalize(rows, dim=-1)
    torch.testing.assert_close(quantizer.embed(codes), rows.flatten(-2), rtol=0, atol=1e-6)


# not by inner product or by attention: the largest logit of a row need not be that row's own
SEARCHED_BY_DISTANCE = sorted(set(CONCATENATED) - {"ibq", "attention"})


@pytest.mark.parametrize("quantizer", SEARCHED_BY_DISTANCE, indirect=True)
def test_encode_inverts_embed(quantizer):
    codes = torch.randint(32, (2, 5, 3))
    assert torch.equal(quantizer.encode(quantizer.embed(codes)), codes)


@pytest.mark.parametrize("quantizer", WITH_ROWS, indirect=True)
def test_gradients(quantizer):
    latents = torch.randn(2, 5, 12, requires_grad=True)
    out = quantizer(latents)
    (sum(out.losses.values()) + out.quantised.square().sum()).backward()
    # a cluster quantiser has a frozen encoder, and the rows of a moving average have no gradient
    for tensor, names in ((latents, ("cluster",)), (quantizer.codebooks, ("ema", "nearest_ema"))):
        if type(quantizer) in [QUANTIZERS[name] for name in names]:
            assert tensor.grad is None
        else:
            assert tensor.grad.isfinite().all() and tensor.grad.any()


@pytest.mark.parametrize("quantizer", WITH_ROWS, indirect=True)
def test_reset_codes(quantizer):
    unused = torch.zeros(3, 32, dtype=torch.bool)
    unused[0, 3] = unused[2, 7] = True
    latents = torch.randn(1, 2, 12)
    rows = quantizer.split(latents)[0, [0, 1], [0, 2]]
    before = quantizer.codebooks.detach().clone()
    quantizer.reset_codes(unused, rows)
    assert torch.equal(quantizer.codebooks[unused], rows)
    assert torch.equal(quantizer.codebooks[~unused], before[~unused])
    codes = quantizer.encode(latents)
    if not isinstance(quantizer, (IBQQuantizer, AttentionQuantizer)):
        assert (codes[0, 0, 0], codes[0, 1, 2]) == (3, 7)
    written = []
    quantizer.reset_codes(unused, rows, write=lambda *given: written.append(given))
    assert written[0][0] is quantizer.codebooks and torch.equal(written[0][1], unused)


@pytest.mark.parametrize("name", sorted(set(QUANTIZERS) - {"library", "none"}))
def test_a_tokenizer_trains_saves_and_loads(name, tiny_config, tmp_path):
    torch.manual_seed(0)
    changes = {"quantizer_options": OPTIONS.get(name), **SIZES.get(name, {})}
    model = UniTok(tiny_config(quantizer=name, **changes)).train()
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    out = model(pixels)
    (out.reconstruction - pixels).square().mean().add(out.losses["vq"]).backward()
    for part in (model.encoder, model.down_projection, model.quantizer, model.up_projection, model.decoder):
        for parameter_name, parameter in part.named_parameters():
            blocked = name == "cluster" and part in (model.encoder, model.down_projection)
            assert blocked or not parameter.requires_grad or parameter.grad is not None, parameter_name
    optimizer.step()
    model.eval().save_pretrained(tmp_path)
    loaded = UniTok.from_pretrained(tmp_path)
    assert type(loaded.quantizer) is QUANTIZERS[name]
    assert loaded.fingerprint() == model.fingerprint()
    codes = model.encode(pixels)
    assert torch.equal(loaded.encode(pixels), codes)
    # close, not equal: the attention quantiser's rows are a product, whose rounding depends on the memory
    torch.testing.assert_close(loaded.decode(codes), model.decode(codes), rtol=0, atol=1e-5)


def test_nearest_finds_the_smallest_distance():
    torch.manual_seed(0)
    quantizer = NearestQuantizer(2, 16, 3)
    latents = 2 * torch.randn(3, 4, 6)
    distances = torch.cdist(latents.view(12, 2, 3).transpose(0, 1), quantizer.codebooks)
    assert torch.equal(quantizer.encode(latents).view(12, 2), distances.argmin(dim=-1).T)
    with pytest.raises(UserError, match=r"'nearest' has no entropy loss: set losses\.entropy to 0"):
        quantizer(latents, entropy=True)


def test_fingerprints_differ_between_quantizers_and_options(tiny_config):
    def fingerprint(**changes) -> str:
        torch.manual_seed(0)
        model = UniTok(tiny_config(**changes))
        torch.nn.init.zeros_(model.quantizer.codebooks)
        return model.fingerprint()

    kinds = ({}, {"quantizer": "nearest"}, {"quantizer": "nearest", "quantizer_options": {"commitment": 1.0}})
    assert len({fingerprint(**changes) for changes in kinds}) == 3
    assert fingerprint(quantizer="multi_codebook", quantizer_options={}) == fingerprint()


def test_unknown_quantizers_and_options(tiny_config):
    with pytest.raises(UserError, match=r"quantizer 'neerest' is not known: QUANTIZERS has multi_codebook.*"):
        UniTok(tiny_config(quantizer="neerest"))
    with pytest.raises(UserError, match=r"Did you mean 'nearest'\?"):
        UniTok(tiny_config(quantizer="neerest"))
    with pytest.raises(UserError, match=r"quantizer_options\.comitment is not an option.*'commitment'"):
        UniTok(tiny_config(quantizer="nearest", quantizer_options={"comitment": 1.0}))
    with pytest.raises(
        UserError, match=r"is not an option of quantizer 'multi_codebook'\. Allowed: .*gradient"
    ):
        UniTok(tiny_config(quantizer_options={"commitment": 1.0}))


@pytest.mark.parametrize(
    ("tokens", "sizes", "words"),
    [
        (21, [64] * 4, r"num_visual_tokens = 16 in .* but 21 in .*'other' \(Quantizer\.num_tokens\)"),
        (16, [64] * 5, r"num_codebooks = 4 in .* but 5 in .*'other' \(Quantizer\.code_sizes, length\)"),
        (16, [9] * 4, r"codebook_size = 64 in .* but 9 in .*'other' \(Quantizer\.code_sizes, maximum\)"),
    ],
)
def test_a_quantizer_must_have_the_sizes_of_the_config(tiny_config, monkeypatch, tokens, sizes, words):
    class Other(NearestQuantizer):
        def __init__(self, num_codebooks: int, codebook_size: int, codebook_dim: int) -> None:
            super().__init__(num_codebooks, codebook_size, codebook_dim)
            self.code_sizes = sizes

        def num_tokens(self, layout: TokenLayout) -> int:
            return tokens

    monkeypatch.setitem(QUANTIZERS, "other", Other)
    with pytest.raises(UserError, match=words):
        build_quantizer(tiny_config(quantizer="other"))


def test_code_dtype():
    assert code_dtype([64, 1 << 16]) == np.uint16
    assert code_dtype([64, (1 << 16) + 1]) == np.uint32
