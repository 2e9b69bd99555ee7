"""Quantisers of vector-quantize-pytorch behind our interface."""

import sys

import pytest
import torch

from open_unitok.core.errors import UserError
from open_unitok.mllm import UniTokMLLMConfig, VisualEmbedder
from open_unitok.mllm.visual_embedder import readable_code_table
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.quantizers import QUANTIZERS

# sizes (K, V, C) and options of each kind
KINDS = {
    "FSQ": ((2, 24, 3), {"levels": [4, 3, 2], "preserve_symmetry": True}),
    "LFQ": ((2, 16, 4), {"spherical": True}),
    "SimVQ": ((2, 16, 4), {}),
    "ResidualVQ": ((3, 16, 4), {"decay": 0.9}),
}


@pytest.fixture(params=KINDS)
def kind(request):
    pytest.importorskip("vector_quantize_pytorch", reason="the extra `library` is not installed")
    return request.param


def make(kind):
    torch.manual_seed(0)
    sizes, options = KINDS[kind]
    return QUANTIZERS["library"](*sizes, kind=kind, **options)


def test_codes_and_rows_are_the_packages(kind):
    quantizer = make(kind).eval()
    books, entries, width = KINDS[kind][0]
    latents = torch.randn(2, 5, quantizer.latent_dim)
    out = quantizer(latents)
    assert out.codes.shape == (2, 5, books) and out.codes.dtype == torch.int64
    assert (out.codes >= 0).all() and (out.codes < entries).all()
    assert torch.equal(quantizer.encode(latents), out.codes)
    torch.testing.assert_close(quantizer.embed(out.codes), out.quantised, rtol=0, atol=1e-5)
    table = quantizer.code_table()
    assert table.shape == (books, entries, width)
    rows = torch.stack([table[k][out.codes[..., k]] for k in range(books)], dim=-2)
    embedded = rows.sum(dim=-2) if quantizer.sums_rows else rows.flatten(-2)
    torch.testing.assert_close(embedded, quantizer.embed(out.codes))
    if kind == "SimVQ":  # by brute force
        chunks = latents.unflatten(-1, (books, -1))
        for k in range(books):
            distance = torch.cdist(chunks[:, :, k], table[k].expand(2, -1, -1))
            assert torch.equal(distance.argmin(dim=-1), out.codes[..., k])
    if kind == "ResidualVQ":
        rest = latents
        for k in range(books):
            nearest = torch.cdist(rest, table[k].expand(2, -1, -1)).argmin(dim=-1)
            assert torch.equal(nearest, out.codes[..., k])
            rest = rest - table[k][nearest]
    if kind == "LFQ":  # the signs are the bits
        bits = (latents.unflatten(-1, (books, -1)) > 0).long()
        assert torch.equal((bits * torch.tensor([8, 4, 2, 1])).sum(dim=-1), out.codes)


def test_it_trains_and_stops(kind):
    quantizer = make(kind).train()
    latents = torch.randn(2, 5, quantizer.latent_dim, requires_grad=True)
    before = quantizer.code_table().clone()
    out = quantizer(latents, entropy=kind == "LFQ")
    (sum(out.losses.values()) + out.quantised.square().sum()).backward()
    assert latents.grad.isfinite().all() and latents.grad.any()
    assert all(p.grad is not None and p.grad.any() for p in quantizer.parameters())
    assert torch.equal(quantizer.code_table(), before) != quantizer.moves_rows
    # neither a frozen quantiser nor encoding moves rows
    quantizer.frozen, before = True, quantizer.code_table().clone()
    quantizer(latents.detach())
    quantizer.frozen = False
    quantizer.encode(latents)
    assert torch.equal(quantizer.code_table(), before) and quantizer.training


def test_it_saves_loads_and_serves_an_mllm(kind, tiny_config, tmp_path):
    torch.manual_seed(0)
    (books, entries, width), options = KINDS[kind]
    config = tiny_config(
        quantizer="library",
        quantizer_options={"kind": kind, **options},
        num_codebooks=books,
        codebook_size=entries,
        codebook_dim=width,
        projection="linear",
    )
    model = UniTok(config)
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    out = model.train()(pixels)
    (out.reconstruction.square().mean() + out.losses["vq"]).backward()
    model.eval().save_pretrained(tmp_path)
    loaded = UniTok.from_pretrained(tmp_path)
    codes = model.encode(pixels)
    assert torch.equal(loaded.encode(pixels), codes) and loaded.fingerprint() == model.fingerprint()
    torch.testing.assert_close(loaded.decode(codes), model.decode(codes), rtol=0, atol=1e-5)
    visual = UniTokMLLMConfig.for_tokenizer(config, projection_heads=1)
    embedder = VisualEmbedder(visual, 32)
    embedder.codebooks.data.copy_(readable_code_table(model))
    torch.testing.assert_close(embedder.embed(codes), model.quantizer.embed(codes))
    with torch.device("meta"):
        counted = UniTok(config)
    assert counted(pixels.to("meta")).codes.shape == codes.shape


def test_wrong_options_are_named(kind):
    sizes, options = KINDS[kind]
    with pytest.raises(UserError, match=r"quantizer_options\.heads is not an option of kind"):
        QUANTIZERS["library"](*sizes, kind=kind, **options, heads=2)
    if kind != "LFQ":
        with pytest.raises(UserError, match="has no entropy loss"):
            make(kind)(torch.randn(1, 2, make(kind).latent_dim), entropy=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "FSK"}, r"kind is 'FSK'\. Did you mean 'FSQ'"),
        ({"kind": "FSQ", "levels": [4, 4]}, r"levels is \[4, 4\]: kind FSQ needs codebook_dim = 4 levels"),
        ({"kind": "FSQ"}, r"levels is \[\]"),
        ({"kind": "LFQ"}, r"codebook_size is 32: kind LFQ has 2\*\*codebook_dim = 16 entries"),
    ],
)
def test_wrong_sizes_are_named(options, words):
    with pytest.raises(UserError, match=words):
        QUANTIZERS["library"](3, 32, 4, **options)


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    with pytest.raises(UserError, match=r"needs the package vector-quantize-pytorch: pip install"):
        QUANTIZERS["library"](3, 16, 4, kind="SimVQ")
