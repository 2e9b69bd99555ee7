"""FQGAN: losses, disentanglement, adapter and gradients against the golden vectors, and their properties."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from open_unitok.core.errors import UserError
from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.tokenizer.quantizers import QUANTIZERS
from open_unitok.tokenizer.quantizers import base as quantizer_base
from open_unitok.tokenizer.quantizers.multi_codebook import disentangle_loss
from open_unitok.tokenizer.token_layout import TokenLayout
from open_unitok.tokenizer.token_transformer import TokenTransformer

TINY = {"image_size": 32, "stem_width": 8, "stage_widths": (8, 8), "stage_depths": (1, 1), "hidden_size": 16}
TINY |= {"decoder_widths": (8, 8), "decoder_depths": (1, 1), "num_hidden_layers": 1, "embed_dim": 8}
TINY |= {"num_attention_heads": 2, "num_codebooks": 2, "codebook_size": 16, "codebook_dim": 8}
TINY |= {"text_hidden_size": 16, "text_num_layers": 1, "text_num_heads": 2, "text_vocab_size": 20}


@pytest.fixture(scope="module")
def vectors(golden):
    tensors = load_file(golden / "quantizers" / "fqgan.safetensors")
    return tensors, json.loads((golden / "quantizers" / "fqgan.meta.json").read_text())["cases"]


def near(found, expected, relative):
    """Differences are measured against the largest magnitude of the tensor."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected.to(found), rtol=0, atol=relative * max(scale, 1e-12))


def build(rows):
    quantizer = QUANTIZERS["multi_codebook"](*rows.shape, entropy_eps=1e-5, disentangle=True)
    quantizer.codebooks.data = rows.clone()
    return quantizer


@pytest.mark.parametrize("case", ["dual", "triple", "eight"])
def test_published_values_and_gradients(vectors, case, monkeypatch):
    monkeypatch.setattr(quantizer_base, "SIMILARITY_BLOCK", 500)  # several blocks per book
    tensors, meta = vectors[0], vectors[1][case]
    settings, scalars = meta["settings"], {k: v["float32"] for k, v in meta["scalars"].items()}
    rows, books = tensors[f"{case}.codebooks"], settings["K"]

    def run(wanted=None):
        quantizer = build(rows)
        latents = tensors[f"{case}.latents"].clone().requires_grad_()
        out = quantizer(latents, entropy=True)
        # the golden sums over books are K times our means
        parts = {
            "out": (tensors[f"{case}.cotangent"] * out.quantised).sum(),
            "entropy": books * out.losses["entropy"],
            "disentangle": out.losses["disentangle"],
            "vq and commitment": books * out.losses["vq"],
        }
        parts["quantise"] = parts["vq and commitment"] + settings["entropy_weight"] * parts["entropy"]
        weighted = settings["disentangle_weight"] * parts["disentangle"]
        parts["total"] = parts["out"] + parts["quantise"] + weighted
        if wanted:
            parts[wanted].backward()
        return quantizer, latents, out, parts

    quantizer, latents, out, parts = run()
    assert torch.equal(out.codes, tensors[f"{case}.codes"])
    assert torch.equal(quantizer.encode(latents.detach()), out.codes)
    near(out.quantised.detach(), tensors[f"{case}.quantised"], 3e-6)
    scalars["vq and commitment"] = scalars["vq"] + scalars["commitment"]
    for name, value in parts.items():
        assert value.item() == pytest.approx(scalars[name], rel=1e-5, abs=5e-6), name
    for name in ("out", "quantise", "entropy", "disentangle", "total"):
        quantizer, latents, *_ = run(name)
        loose = name in ("quantise", "entropy", "total")  # temperature 0.01 magnifies rounding
        near(latents.grad, tensors[f"{case}.grad_latents.{name}"], 3e-4 if loose else 2e-5)
        if loose:
            near(quantizer.codebooks.grad, tensors[f"{case}.grad_codebooks.{name}"], 3e-4)
        else:
            assert quantizer.codebooks.grad is None


@pytest.mark.parametrize("case", ["pairs_2", "pairs_3"])
def test_disentanglement_of_free_vectors(vectors, case):
    tensors, meta = vectors[0], vectors[1][case]
    free = tensors[f"{case}.vectors"].clone().requires_grad_()
    loss = disentangle_loss(free.unflatten(-1, (meta["settings"]["K"], -1)))
    loss.backward()
    assert loss.item() == pytest.approx(meta["scalars"]["disentangle"]["float32"], rel=1e-5, abs=5e-6)
    near(free.grad, tensors[f"{case}.grad_vectors"], 2e-5)


def test_disentanglement_of_known_vectors():
    same = torch.randn(2, 5, 1, 8).expand(2, 5, 3, 8)
    assert disentangle_loss(same).item() == pytest.approx(1, abs=1e-6)
    assert disentangle_loss(torch.eye(8).expand(2, 8, 8)).item() == 0
    torch.manual_seed(0)
    for books in (2, 8):
        free = torch.randn(40_000 // books, books, 8)
        assert disentangle_loss(free).item() == pytest.approx(1 / 8, rel=0.03)
    unit = F.normalize(free[:50].double(), dim=-1)
    pairs = [(unit[:, i] * unit[:, j]).sum(-1) ** 2 for i in range(8) for j in range(i)]
    assert disentangle_loss(free[:50]).item() == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-6)


def test_disentanglement_only_where_requested():
    latents = torch.randn(1, 4, 8)
    assert "disentangle" not in QUANTIZERS["multi_codebook"](2, 16, 4)(latents).losses
    with pytest.raises(UserError, match="num_codebooks is 1"):
        QUANTIZERS["multi_codebook"](1, 16, 4, disentangle=True)


def test_entropy_eps_biases_large_books():
    rows = 2 * torch.eye(64)[None]
    found = {}
    for eps in (1e-7, 1e-2):
        quantizer = QUANTIZERS["multi_codebook"](1, 64, 64, entropy_eps=eps)
        quantizer.codebooks.data = rows.clone()
        found[eps] = quantizer(rows, entropy=True).losses["entropy"].item()
    assert found[1e-7] == pytest.approx(-math.log(64), abs=1e-4)
    assert found[1e-2] == pytest.approx(math.log(1 / 64 + 1e-2), abs=1e-4)


def test_rows_start_at_unit_norm(tmp_path):
    config = UniTokConfig.named(
        "vitamin_small", **TINY, quantizer_options={"unit_rows": True, "entropy_eps": 1e-5}
    )
    model = UniTok(config)
    model.quantizer.codebooks.data *= 3
    model.save_pretrained(tmp_path)
    # loading must not normalise the rows again
    assert torch.equal(UniTok.from_pretrained(tmp_path).quantizer.codebooks, model.quantizer.codebooks)
    rows = QUANTIZERS["multi_codebook"](2, 16, 8, unit_rows=True).codebooks
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(2, 16))
    assert QUANTIZERS["multi_codebook"](2, 16, 8).codebooks.norm(dim=-1).max() < 0.1


# ---- the transformer of a book ---------------------------------------------------------------------------


def block_names(weights):
    """Golden names -> ours."""
    return {
        name.replace(".qkv.", ".attention.qkv.").replace(".out.", ".attention.out."): tensor
        for name, tensor in weights.items()
    }


def golden_weights(tensors, case):
    start = f"{case}.weights."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def test_golden_adapter(vectors):
    tensors, settings = vectors[0], vectors[1]["adapter"]["settings"]
    adapter = TokenTransformer(settings["D"], settings["layers"], settings["heads"], TokenLayout(3, 3))
    adapter.load_state_dict(block_names(golden_weights(tensors, "adapter")))
    inputs = tensors["adapter.inputs"].clone().requires_grad_()
    outputs = adapter(inputs)
    near(outputs.detach(), tensors["adapter.outputs"], 1e-5)
    (tensors["adapter.cotangent"] * outputs).sum().backward()
    near(inputs.grad, tensors["adapter.grad_inputs"], 2e-5)


def test_each_book_has_its_own_adapter():
    torch.manual_seed(0)
    model = UniTok(UniTokConfig.named("vitamin_small", **TINY, adapter_layers=1, adapter_heads=2)).eval()
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = model.encode_latents(pixels)
    with torch.no_grad():
        model.down_projection.adapters[1].positions += 1
    changed = model.encode_latents(pixels)
    assert torch.equal(latents[..., :8], changed[..., :8]) and not torch.equal(latents, changed)
    # other grids than the training image's, oblong ones too
    wide = torch.rand(1, 3, 48, 80) * 2 - 1
    assert model.decode(model.encode(wide), (3, 5)).shape == wide.shape
    grown = TokenTransformer(8, 0, 1, TokenLayout(2, 2, registers=1), class_token=True)
    assert grown(torch.zeros(1, 1 + 12, 8), (3, 4)).shape == (1, 14, 8)
    assert torch.equal(grown._positions((3, 4))[:2], grown.positions[:2])


def test_adapters_change_nothing_where_there_are_none(tmp_path):
    plain = UniTok(UniTokConfig.named("vitamin_small", **TINY))
    assert not any("adapter" in name for name in plain.state_dict())
    adapted = UniTok(UniTokConfig.named("vitamin_small", **TINY, adapter_layers=1, adapter_heads=2))
    adapted.save_pretrained(tmp_path)
    loaded = UniTok.from_pretrained(tmp_path)
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(loaded.encode(pixels), adapted.eval().encode(pixels))
    assert loaded.fingerprint() == adapted.fingerprint()
    # the number of heads changes codes, but no tensor
    loaded.config.adapter_heads = 4
    assert loaded.fingerprint() != adapted.fingerprint()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"adapter_layers": 1, "adapter_heads": 3}, "adapter_heads = 3 does not divide"),
        ({"adapter_layers": 1, "adapter_heads": 0}, "adapter_heads = 0: must be at least 1"),
        ({"adapter_layers": -1}, "adapter_layers = -1: must be at least 0"),
        ({"adapter_layers": 1, "projection_causal": True}, "adapters attend to all tokens"),
    ],
)
def test_adapters_that_do_not_fit(options, words):
    with pytest.raises(UserError, match=words):
        UniTok(UniTokConfig.named("vitamin_small", **TINY, **options))
