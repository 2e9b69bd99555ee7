"""Pyramids: TokenFlow's and CODA's published codes, sums, losses and gradients, decoding and refusals."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from open_unitok.core.errors import UserError
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.quantizers import QUANTIZERS
from open_unitok.tokenizer.quantizers.residual import next_scale_inputs
from open_unitok.tokenizer.token_layout import TokenLayout

TOKENFLOW = ["pyramid", "pyramid_eval", "pyramid_drop2", "pyramid_drop3", "pyramid_phi"]
NORMS = {"rms_norm": "rms", "layer_norm": "layer", None: None}


def read(golden, name):
    folder = golden / "quantizers"
    return load_file(folder / f"{name}.safetensors"), json.loads((folder / f"{name}.meta.json").read_text())


@pytest.fixture(scope="module")
def tokenflow(golden):
    tensors, meta = read(golden, "tokenflow")
    return tensors, meta["cases"]


@pytest.fixture(scope="module")
def coda(golden):
    tensors, meta = read(golden, "coda")
    return tensors, meta["cases"]


def near(found, expected, tolerance, name=""):
    """Differences are measured over max(1, largest value)."""
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale, msg=lambda m: f"{name}: {m}")


def tokens(grid):
    return grid.flatten(2).transpose(1, 2)


def make(scales, width=9, entries=24, **options):
    torch.manual_seed(0)
    return QUANTIZERS["residual"](1, entries, width, scales=scales, **options)


def tokenflow_pyramid(tensors, scales, phi=False, **options):
    inner = {"inner": "shared_index", "inner_options": {"block_widths": [6, 3]}}
    quantizer = make(scales, shared_convolutions=4 if phi else 0, **inner, **options)
    rows = torch.cat([tensors["weights.semantic_table"], tensors["weights.pixel_table"]], dim=-1)
    quantizer.codebooks.data = rows[None].clone()
    for number, convolutions in enumerate(quantizer.phi.convolutions):
        for name, convolution in zip(("semantic", "pixel"), convolutions):
            convolution.weight.data = tensors[f"weights.phi.{number}.{name}.weight"].clone()
            convolution.bias.data = tensors[f"weights.phi.{number}.{name}.bias"].clone()
    return quantizer


def latents_of(tensors, suffix=""):
    return tokens(torch.cat([tensors[f"in.semantic{suffix}"], tensors[f"in.pixel{suffix}"]], dim=1))


@pytest.mark.parametrize("case", TOKENFLOW)
def test_tokenflow(tokenflow, case):
    tensors, meta = tokenflow[0], tokenflow[1][case]
    suffix = "_phi" if case == "pyramid_phi" else ""
    quantizer = tokenflow_pyramid(tensors, meta["all_scales"], phi=bool(suffix)).train(meta["train"])
    if len(meta["scales"]) < len(meta["all_scales"]):
        quantizer.skip = int(case[-1])
    latents = latents_of(tensors, suffix).requires_grad_()
    out = quantizer(latents, entropy=meta["train"])
    assert torch.equal(out.codes[..., 0], tensors[f"{case}.out.codes"])
    near(out.quantised.detach(), tokens(tensors[f"{case}.out.quantised"]), 5e-6)
    if quantizer.skip is None:
        assert torch.equal(quantizer.encode(latents.detach()), out.codes)
        near(quantizer.embed(out.codes).detach(), out.quantised.detach(), 1e-6)
    if not meta["train"]:
        return
    assert out.losses["vq"].item() == pytest.approx(meta["codebook"] + meta["commitment"], abs=5e-6)
    assert 0.1 * out.losses["entropy"].item() == pytest.approx(meta["entropy"], abs=1e-5)
    cotangent = tokens(tensors[f"in.cotangent_{5 if suffix else 4}"])
    (out.losses["vq"] + 0.1 * out.losses["entropy"] + (out.quantised * cotangent).mean()).backward()
    grads = [tensors[f"{case}.grad.{name}"] for name in ("semantic", "pixel")]
    near(latents.grad, tokens(torch.cat(grads, dim=1)), 2e-5)
    grads = [tensors[f"{case}.grad.{name}_table"] for name in ("semantic", "pixel")]
    near(quantizer.codebooks.grad[0], torch.cat(grads, dim=-1), 2e-5)
    for number, convolutions in enumerate(quantizer.phi.convolutions):
        for name, convolution in zip(("semantic", "pixel"), convolutions):
            for kind, parameter in convolution.named_parameters():
                norm = meta[f"grad_norm.phi.{number}.{name}.{kind}"]
                assert parameter.grad.norm().item() == pytest.approx(norm, rel=2e-5, abs=2e-6)


def test_tokenflow_decodes_prefixes_of_whole_scales(tokenflow):
    tensors = tokenflow[0]
    quantizer = tokenflow_pyramid(tensors, [1, 2, 3, 4]).eval()
    codes = tensors["pyramid.out.codes"][..., None]
    near(quantizer.embed(codes).detach(), tokens(tensors["decode.out.quantised"]), 5e-6)
    for length in (1, 5, 14, 30):
        pixel = quantizer.embed(codes[:, :length]).detach()[..., 6:]
        near(pixel, tokens(tensors[f"decode.out.pixel_{length}"]), 5e-6)
    words = r"codes have 20 tokens; the scales \[1, 2, 3, 4\] take 30 \(or 1, 5, 14 of the first scales\)\."
    with pytest.raises(UserError, match=words):
        quantizer.embed(codes[:, :20])


def test_tokenflows_next_scale_inputs(tokenflow):
    tensors, _ = tokenflow
    quantizer = tokenflow_pyramid(tensors, [1, 2, 3, 4])
    rows = quantizer.inner.embed(tensors["pyramid.out.codes"].unsqueeze(-1))
    for name, again in (("", None), ("_again1", 1), ("_again3", 3)):
        found = next_scale_inputs(rows, [1, 2, 3, 4], again)
        near(found, tensors[f"drawing.out.inputs{name}"], 5e-6, name)


@pytest.mark.parametrize("case", ["rms", "layer", "none"])
def test_coda(coda, case):
    tensors, meta = coda[0], coda[1][case]
    rows, grid = tensors[f"{case}.weights.codebook"], tensors[f"{case}.in.latents"]
    inner = {"attention_dim": meta["attn_dim"], "norm": NORMS[meta["norm"]], "codebook": meta["beta"]}
    inner["temperature"] = meta["entropy_temperature"]
    quantizer = make(
        meta["scales"], rows.shape[1], len(rows), inner="attention", inner_options=inner, detach=False
    )
    quantizer.grid = tuple(grid.shape[2:])
    names = {"q": "query", "k": "key", "v": "value"}
    maps = {name: getattr(quantizer.inner, long) for name, long in names.items()}
    maps |= {"q_norm": quantizer.inner.query_norm, "k_norm": quantizer.inner.key_norm}
    parameters = {f"{m}.{n}": p for m, module in maps.items() for n, p in module.named_parameters()}
    parameters["codebook"] = quantizer.codebooks
    for name, parameter in parameters.items():
        parameter.data = tensors[f"{case}.weights.{name}"].clone().view_as(parameter)
    latents = tokens(grid).requires_grad_()
    out = quantizer(latents, entropy=True)
    assert torch.equal(out.codes[..., 0], tensors[f"{case}.out.codes"])
    assert torch.equal(quantizer.encode(latents.detach()), out.codes)
    near(out.quantised.detach(), tokens(tensors[f"{case}.out.f_hat"]), 5e-6)
    near(quantizer.embed(out.codes).detach(), tokens(tensors[f"{case}.out.decoded"]), 5e-6)
    last = quantizer.reset_latents(latents)
    logits = quantizer.inner.queries(last)[:, :, 0] @ quantizer.inner._keys()[0].T
    near(logits.detach().flatten(0, 1), tensors[f"{case}.out.logits_last_scale"], 5e-6)
    assert out.losses["vq"].item() == pytest.approx(meta["vq"], rel=5e-6)
    assert out.losses["entropy"].item() == pytest.approx(meta["entropy"], rel=2e-5)
    cotangent = tokens(tensors[f"{case}.in.cotangent"])
    (out.losses["vq"] + 0.05 * out.losses["entropy"] + (out.quantised * cotangent).mean()).backward()
    near(latents.grad, tokens(tensors[f"{case}.grad.latents"]), 2e-5)
    for name, parameter in parameters.items():
        near(parameter.grad, tensors[f"{case}.grad.{name}"].view_as(parameter), 2e-5, name)


# ---- properties ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scales", "count"),
    [
        ([1, 2, 4, 6, 8, 10, 12, 14], 561),
        ([1, 2, 4, 6, 8, 10, 12, 14, 16], 817),
        ([*range(1, 11), 12, 14, 17, 22, 27], 2227),
        ([1, 2, 3, 4, 5, 6, 8, 10, 13, 16], 680),
        ([1, 2, 3, 4, 6, 9, 13, 18, 24, 32], 2240),
    ],
)
def test_published_token_counts(scales, count):
    quantizer = make(scales, 4)
    assert quantizer.num_tokens(TokenLayout(scales[-1], scales[-1])) == count
    assert quantizer.check_length(count) == len(scales)


@pytest.mark.parametrize(("scales", "chosen"), [(5, [0, 1, 2, 2, 3]), (9, [0, 0, 1, 1, 2, 2, 2, 3, 3])])
def test_shared_convolution_of_each_scale(scales, chosen):
    phi = make([1, 2], shared_convolutions=4).phi
    assert [phi.choose(number / (scales - 1)) for number in range(scales)] == chosen
    assert np.allclose(make([1, 2], shared_convolutions=3).phi.ticks, [1 / 6, 1 / 2, 5 / 6])


def test_resizing():
    quantizer = make([1, 8], 4)
    up = quantizer._upsample(torch.randn(2, 1, 4), 0, [1, 8])
    torch.testing.assert_close(up, up[:, :, :1, :1].expand_as(up), rtol=0, atol=2e-6)
    grid = torch.randn(2, 4, 8, 8)
    assert torch.equal(F.interpolate(grid, (8, 8), mode="area"), grid)
    assert torch.equal(quantizer._upsample(tokens(grid), 1, [1, 8]), grid)


NOT_INSIDE = {"residual", "language", "library", "none", "gaussian"}


@pytest.mark.parametrize("inner", sorted(set(QUANTIZERS) - NOT_INSIDE))
def test_decode_equals_the_evaluation_forward(inner):
    """Over any other quantiser; "language" has three codes per token and word lists."""
    quantizer = make([1, 2, 4], 8, 32, inner=inner).eval()
    latents = torch.randn(3, 16, 8)
    out = quantizer(latents)
    assert out.codes.shape == (3, 21, 1)
    assert torch.equal(quantizer.encode(latents), out.codes)
    near(quantizer.embed(out.codes).detach(), out.quantised.detach(), 1e-6)


def test_detaching_changes_the_gradient_only():
    found = []
    for detach in (True, False):
        quantizer = make([1, 2, 4], 8, 32, inner="attention", detach=detach)
        latents = torch.randn(3, 16, 8, requires_grad=True)
        out = quantizer(latents)
        (out.losses["vq"] + out.quantised.square().mean()).backward()
        found.append((out.codes, out.quantised.detach(), latents.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert (found[0][2] - found[1][2]).abs().max() > 1e-3


def test_usage_counts_once_for_all_scales():
    quantizer = make([1, 2, 4], 8, 32).train()
    out = quantizer(torch.randn(3, 16, 8))
    assert quantizer.calls == 1 and quantizer.inner.calls == 0
    torch.testing.assert_close(quantizer.usage[0], torch.bincount(out.codes.flatten(), minlength=32) / 63)
    assert out.usage.item() == pytest.approx(100 * len(out.codes.unique()) / 32)


def test_kmeans_starts_the_inner_quantiser():
    quantizer = make([1, 2], 4, 8, inner="ema")
    quantizer.start_kmeans(torch.randn(40, 4), torch.arange(8)[None])
    assert quantizer.inner.started and quantizer.moves_rows and not quantizer.trains_rows


def test_losses_are_means_over_scales():
    quantizer = make([1, 4], 8, 32).train()
    latents = torch.randn(3, 16, 8)
    out = quantizer(latents, entropy=True)
    parts = []
    chunks = latents.mean(dim=1, keepdim=True)
    for rest in (chunks, latents - quantizer.inner.embed(quantizer.inner.encode(chunks))):
        parts.append(quantizer.inner(rest, entropy=True).losses)
    for name in ("vq", "entropy"):
        assert out.losses[name].item() == pytest.approx(sum(p[name].item() for p in parts) / 2, rel=1e-4)


def test_scale_drop_is_sampled_from_the_generator():
    quantizer = make([1, 2, 3, 4], 8, 32, scale_drop=0.5).train()
    found = []
    for step in range(200):
        quantizer.start_step(torch.Generator().manual_seed(step))
        found.append(quantizer.skip)
    assert 70 < sum(skip is not None for skip in found) < 130
    assert {skip for skip in found if skip is not None} == {1, 2, 3}  # never the first
    quantizer.skip = 1
    assert quantizer(torch.randn(1, 16, 8)).codes.shape == (1, 26, 1)
    quantizer.eval()
    assert quantizer(torch.randn(1, 16, 8)).codes.shape == (1, 30, 1)
    with pytest.raises(UserError, match=r"scale_drop = 0\.1 needs 3 or more scales, not \[1, 4\]"):
        make([1, 4], scale_drop=0.1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"scales": [1, 4, 2]},
            r"scales = \[1, 4, 2\]: rising sides are needed, the last of them image_size // ",
        ),
        ({"scales": []}, r"scales = \[\]: rising sides are needed"),
        ({"scales": [1, 4], "inner": "residual"}, r"inner = 'residual'\. Allowed: .*multi_codebook"),
        ({"scales": [1, 4], "inner": "shared"}, r"inner = 'shared'\. Did you mean 'shared_index'\?"),
        ({"scales": [1, 4], "inner_options": {"commit": 1}}, r"inner_options\.commit is not an option of"),
        ({"scales": [1, 4], "shared_convolutions": -1}, r"shared_convolutions = -1: must be at least 0"),
        ({"scales": [1, 2, 4], "scale_drop": 1.0}, r"scale_drop = 1\.0: must be in \[0, 1\)"),
    ],
)
def test_invalid_options(options, words):
    with pytest.raises(UserError, match=words):
        QUANTIZERS["residual"](1, 16, 4, **options)


# ---- in a tokenizer --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pyramid(tiny_config):
    torch.manual_seed(0)
    options = {"scales": [1, 2, 4], "inner": "shared_index"}
    return UniTok(tiny_config(quantizer="residual", quantizer_options=options)).eval()


def test_encode_and_decode(pyramid):
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    codes = pyramid.encode(pixels)
    assert codes.shape == (2, 21, 4) and pyramid.config.num_visual_tokens == 21
    assert torch.equal(pyramid(pixels).codes, codes)
    decoded = pyramid.decode(codes)
    assert decoded.shape == pixels.shape
    torch.testing.assert_close(decoded, pyramid(pixels).reconstruction.clamp(-1, 1), atol=1e-5, rtol=0)
    assert torch.equal(pyramid.decode(codes, (4, 4)), decoded)
    coarse = [pyramid.decode(codes[:, :length]) for length in (1, 5)]
    assert coarse[0].shape == pixels.shape and not torch.equal(coarse[0], coarse[1])
    torch.testing.assert_close(pyramid.embed_image(pixels), pyramid(pixels).image_embeds, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match=r"codes have 20 tokens; the scales \[1, 2, 4\] take 21 \(or 1, 5 of"):
        pyramid.decode(codes[:, :20])
    with pytest.raises(UserError, match=r"grid = \(2, 8\) does not fit the scales \[1, 2, 4\]"):
        pyramid.decode(codes, (2, 8))


def test_images_of_other_sizes_are_refused(pyramid):
    for shape, words in (((64, 80), "64 x 80"), ((32, 32), "32 x 32")):
        message = f"scales need square images of 64 pixels; this one has {words}"
        with pytest.raises(UserError, match=message):
            pyramid.encode(torch.zeros(1, 3, *shape))


@pytest.mark.parametrize(
    ("changes", "scales", "words"),
    [
        ({}, [1, 4, 2], r"scales = \[1, 4, 2\]: rising sides are needed, the last of them image_size // "
         r"patch_size = 4\."),
        ({}, [1, 2, 3], r"the last of them image_size // patch_size = 4\."),
        ({}, None, r"scales = \[\]: rising sides are needed"),
        ({}, 4, r"scales = 4: rising sides are needed"),
        ({}, ["1", 4], r"scales = \['1', 4\]: rising sides are needed"),
        ({"num_register_tokens": 4}, [1, 2, 4], r"num_register_tokens = 4 together with scales: set one of"),
        ({"image_size": 80, "token_layout": {"rows": 4, "columns": 5}}, [1, 2, 4],
         r"scales need square images of 64 pixels; this one has 64 x 80\."),
    ],
)  # fmt: skip
def test_configs_that_contradict_scales(tiny_config, changes, scales, words):
    with pytest.raises(UserError, match=words):
        tiny_config(quantizer="residual", quantizer_options={"scales": scales}, **changes)


def test_scales_and_shared_convolutions_are_in_the_fingerprint(tiny_config):
    def fingerprint(**options):
        torch.manual_seed(0)
        return UniTok(tiny_config(quantizer="residual", quantizer_options=options)).fingerprint()

    kinds = [{"scales": [1, 2, 4]}, {"scales": [1, 4]}, {"scales": [1, 4], "shared_convolutions": 1}]
    assert len({fingerprint(**kind) for kind in kinds}) == 3


# ---- learning --------------------------------------------------------------------------------------------


def smooth_latents(width):
    """(8, 64, width) tokens of 8 x 8 grids that a pyramid can describe, standard deviation 1."""
    grid = F.interpolate(torch.randn(8, width, 3, 3), (8, 8), mode="bicubic")
    return tokens(grid / grid.std())


def test_coda_learns_latents_and_then_every_scale_helps():
    quantizer = make([1, 2, 4, 8], 4, 64, inner="attention", detach=False)
    for parameter in quantizer.inner.value.parameters():
        parameter.data.mul_(0.1)  # near zero rows at first: scales do not overshoot
    latents = smooth_latents(4)
    optimizer = torch.optim.AdamW(quantizer.parameters(), 1e-2)
    for _ in range(70):
        out = quantizer(latents, entropy=True)
        reconstruction = F.mse_loss(out.quantised, latents)
        optimizer.zero_grad()
        (reconstruction + out.losses["vq"] + 0.05 * out.losses["entropy"]).backward()
        optimizer.step()
    codes = quantizer.encode(latents)
    energies = [F.mse_loss(quantizer.embed(codes[:, :n]), latents).item() for n in (1, 5, 21, 85)]
    assert energies == sorted(energies, reverse=True) and energies[0] < 1 and energies[-1] < 0.15
    assert len(codes.unique()) > 50


def test_tokenflow_learns_pixels_and_features():
    inner = {"inner": "shared_index", "inner_options": {"block_widths": [8, 4]}}
    quantizer = make([1, 2, 4, 8], 12, 64, **inner)
    inputs = smooth_latents(6)
    features = torch.tanh(inputs @ torch.randn(6, 10))
    encoder, pixel, semantic = torch.nn.Linear(6, 12), torch.nn.Linear(4, 6), torch.nn.Linear(8, 10)
    optimizer = torch.optim.AdamW(
        [*quantizer.parameters(), *(p for m in (encoder, pixel, semantic) for p in m.parameters())], 1e-2
    )
    found = []
    for _ in range(70):
        out = quantizer(encoder(inputs))
        first, second = out.quantised.split([8, 4], dim=-1)
        reconstruction = F.mse_loss(pixel(second), inputs)
        teacher = (1 - F.cosine_similarity(semantic(first), features, dim=-1)).mean()
        found.append((reconstruction.item(), teacher.item(), out.losses["vq"].item()))
        optimizer.zero_grad()
        (reconstruction + teacher + out.losses["vq"]).backward()
        optimizer.step()
    for before, after, share in zip(found[0], found[-1], (0.5, 0.25, 0.6)):
        assert after < share * before


# ---- what an inner quantiser needs of its pyramid ----------------------------------------------------------


def test_dead_rows_of_an_inner_quantiser_follow_from_the_step():
    """Not from torch's global generator, which differs from rank to rank."""
    found = []
    for seed in (1, 2):
        quantizer = make([1, 2, 4], 8, 32, inner="nearest_ema").train()
        torch.manual_seed(seed)
        quantizer.start_step(torch.Generator().manual_seed(5))
        quantizer.order = range(3)
        quantizer(torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(0)))
        found.append(quantizer.codebooks.detach().clone())
    assert torch.equal(*found)


def test_dead_rows_do_not_depend_on_the_order_of_a_batch():
    latents, order, found = torch.randn(3, 16, 8), [2, 0, 1], []
    for places in ([0, 1, 2], order):
        quantizer = make([1, 2, 4], 8, 32, inner="nearest_ema").train()
        quantizer.start_step(torch.Generator().manual_seed(5))
        quantizer.order = places
        quantizer(latents[places])
        found.append(quantizer.codebooks.detach().clone())
    torch.testing.assert_close(*found)


def test_inner_dropout_changes_from_step_to_step():
    options = {"word_dim": 6, "hidden": 32, "dropout": 0.5}
    quantizer = make([1, 2], 4, 16, inner="language_map", inner_options=options).train()
    latents = torch.randn(2, 4, 4)
    first, second = (quantizer(latents).quantised for _ in range(2))
    assert not torch.equal(first, second)


def test_kmeans_is_not_repeated():
    quantizer = make([1, 2], 4, 16, inner="ema")
    assert not quantizer.started
    quantizer.start_kmeans(torch.randn(40, 4), torch.arange(16)[None])
    assert quantizer.started


@pytest.mark.parametrize(
    ("inner", "options", "buffer"),
    [
        ("language_map", {"word_dim": 6, "hidden": 8}, "inner.map.vectors"),
        ("library", {"kind": "ResidualVQ"}, "inner.library.0.layers.0._codebook.embed"),
    ],
)
def test_rows_that_are_no_parameters_are_in_the_fingerprint(inner, options, buffer):
    if inner == "library":
        pytest.importorskip("vector_quantize_pytorch")
    quantizer = make([1, 2], 4, 16, inner=inner, inner_options=options)
    assert torch.equal(quantizer.fingerprint_tensors()[buffer], quantizer.state_dict()[buffer])
