"""Query tokens: the golden layer, both ways, and tokenizers with n tokens of an image."""

import pytest
import torch
from safetensors.torch import load_file

from open_unitok.core.errors import UserError
from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.tokenizer.token_layout import TokenLayout
from open_unitok.tokenizer.token_transformer import QueryResampler

LAYOUT = {"rows": 4, "columns": 4, "tokens": 5}
VIT = {"encoder": "hf_vision", "model_type": "vit", "hidden_size": 24, "num_hidden_layers": 2}
VIT |= {"num_attention_heads": 2, "intermediate_size": 48}
KINDS = {
    "vitamin": {
        "token_layout": LAYOUT,
        "encoder_options": {"query_layers": 2, "query_heads": 4},
        "decoder_options": {"query_layers": 1},
    },
    "vitamin, layer by layer": {
        "token_layout": LAYOUT,
        "encoder_options": {"query_layers": 3, "query_reads": "layers"},
        "decoder_options": {"query_layers": 2, "hidden_size": 48},
    },
    "ViT of 8 x 8 patches": {
        "token_layout": {"rows": 8, "columns": 8, "tokens": 7},
        "patch_size": 8,
        "encoder_options": {**VIT, "query_layers": 2, "query_heads": 2, "query_reads": "layers"},
        "decoder_options": {"decoder": "vit", "query_layers": 2, "num_hidden_layers": 1},
    },
    "more tokens than cells": {
        "token_layout": {"rows": 2, "columns": 4, "tokens": 20},
        "encoder_options": {"query_layers": 1},
        "decoder_options": {"query_layers": 1},
    },
    "language": {
        "token_layout": LAYOUT,
        "encoder_options": {"query_layers": 1},
        "decoder_options": {"query_layers": 1},
        "quantizer": "language",
        "quantizer_options": {"adjectives": 5, "nouns": 9, "word_dim": 6, "hidden": 8, "edges": 2},
        "num_codebooks": 3,
        "codebook_size": 9,
        "codebook_dim": 16,
    },
}


@pytest.fixture
def build(tiny_config):
    """build(**changes) -> a tokenizer with queries, the same weights for the same config."""

    def make(**changes) -> UniTok:
        torch.manual_seed(0)
        return UniTok(tiny_config(**{"encoder": "resampled", "decoder": "resampled", **changes})).eval()

    return make


def pixels(config: UniTokConfig) -> torch.Tensor:
    shape = (2, 3, *config.image_shape)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_golden_layer(golden):
    tensors = load_file(golden / "quantizers" / "language_codebook.safetensors")
    found = {k.removeprefix("resampler."): v for k, v in tensors.items() if k.startswith("resampler.")}
    resampler = QueryResampler(6, 32, heads=4)
    weights = {k: v for k, v in found.items() if k.endswith(("weight", "bias"))}
    resampler.layers[0].load_state_dict(weights)
    resampler.queries.data = found["queries"].clone()
    out = resampler(found["x"])
    torch.testing.assert_close(out.double(), found["out"], rtol=1e-5, atol=1e-5)


def test_there_and_back():
    torch.manual_seed(0)
    down, up = QueryResampler(4, 16, depth=2), QueryResampler(9, 16, depth=2)
    tokens = torch.randn(3, 9, 16, requires_grad=True)
    fewer = down(tokens)
    assert fewer.shape == (3, 4, 16) and up(fewer).shape == (3, 9, 16)
    up(fewer).square().sum().backward()
    for module in (down, up):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert tokens.grad.any()
    # the tokens have no order of their own
    torch.testing.assert_close(down(tokens.flip(1)), fewer)


def test_each_layer_may_read_its_own_tokens():
    torch.manual_seed(0)
    resampler = QueryResampler(4, 16, depth=2)
    first, second = torch.randn(2, 3, 9, 16)
    by_hand = resampler.layers[1](resampler.layers[0](resampler.queries.expand(3, -1, -1), first), second)
    assert torch.equal(resampler([first, second]), by_hand)
    assert torch.equal(resampler([first, first]), resampler(first))
    with pytest.raises(ValueError, match="zip"):
        resampler([first])


@pytest.mark.parametrize(("sizes", "words"), [((0, 16), "num_queries"), ((4, 12, 1, 5), "5 heads")])
def test_wrong_sizes_are_named(sizes, words):
    with pytest.raises(UserError, match=words):
        QueryResampler(*sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_saves_loads_and_keeps_its_layout(build, tmp_path, kind):
    model = build(**KINDS[kind]).train()
    config = model.config
    tokens = config.token_layout["tokens"]
    assert config.num_visual_tokens == tokens == model.encoder.tokens == model.decoder.tokens
    out = model(pixels(config), torch.randint(0, 512, (2, 5)), entropy=kind != "language")
    assert out.codes.shape == (2, tokens, config.num_codebooks)
    assert out.reconstruction.shape == pixels(config).shape
    similarity = (out.logit_scale * out.image_embeds @ out.text_embeds.T).logsumexp(-1).sum()
    (out.reconstruction.square().mean() + sum(out.losses.values()) + similarity).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # ViT adds the embedding of its CLS token and the keys' biases, which softmax cancels
        assert parameter.grad.any() or "bias" in name, name
    model.eval().save_pretrained(tmp_path)
    loaded = UniTok.from_pretrained(tmp_path)
    codes = model.encode(pixels(config))
    assert loaded.config.layout == config.layout == TokenLayout(**config.token_layout)
    assert torch.equal(loaded.encode(pixels(config)), codes)
    assert torch.equal(loaded.decode(codes), model.decode(codes))
    assert loaded.fingerprint() == model.fingerprint()
    half = UniTok.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.decode(half.encode(pixels(config))).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_decoded_codes_are_the_forward_pass(build, kind):
    model = build(**KINDS[kind])
    with torch.no_grad():
        out = model(pixels(model.config))
    assert torch.equal(out.codes, model.encode(pixels(model.config)))
    torch.testing.assert_close(model.decode(out.codes), out.reconstruction.clamp(-1, 1), atol=1e-4, rtol=0)


def test_the_last_layer_read_is_the_encoders_output(build):
    for kind in ("vitamin, layer by layer", "ViT of 8 x 8 patches"):
        model = build(**KINDS[kind])
        outputs = model.encoder.inner.layer_outputs(pixels(model.config))
        assert len(outputs) == model.encoder.inner.num_layers == len(model.encoder.resampler.layers)
        assert torch.equal(outputs[-1], model.encoder.inner(pixels(model.config)))
        assert all(output.shape == outputs[-1].shape for output in outputs)


def test_every_token_reaches_every_patch_and_tokens_have_an_order(build):
    model = build(**KINDS["vitamin"])
    with torch.no_grad():
        model.quantizer.codebooks.normal_()
    codes = model.encode(pixels(model.config))
    whole = model.decode(codes)
    for token in range(codes.shape[1]):
        changed = codes.clone()
        changed[:, token] = (changed[:, token] + 1) % 64
        difference = (model.decode(changed) - whole).abs().unflatten(2, (4, 16)).unflatten(4, (4, 16))
        assert (difference.amax(dim=(1, 3, 5)) > 0).all()
    assert not torch.allclose(model.decode(codes.flip(1)), whole, atol=1e-4)


def test_fingerprints_follow_what_decides_codes(build):
    plain = KINDS["vitamin, layer by layer"]
    options = plain["encoder_options"]
    others = [
        {"encoder_options": options | {"query_reads": "output"}},
        {"encoder_options": options | {"query_heads": 2}},
        {"encoder_options": options | {"num_attention_heads": 4}},
        {"token_layout": LAYOUT | {"tokens": 6}},
    ]
    found = {build(**plain).fingerprint()} | {build(**{**plain, **other}).fingerprint() for other in others}
    assert len(found) == 1 + len(others)
    decoder = {"decoder_options": plain["decoder_options"] | {"query_heads": 4}}
    assert build(**{**plain, **decoder}).fingerprint() in found  # the decoder decides no codes


@pytest.mark.parametrize(("shape", "grid"), [((64, 32), (4, 4)), ((128, 128), (8, 8))])
def test_other_images_grids_and_numbers_of_tokens_are_rejected(build, shape, grid):
    model = build(**KINDS["vitamin"])
    with pytest.raises(UserError, match=rf"Images of {shape[0]} x {shape[1]} .* 5 tokens .* of 64 x 64"):
        model.encode(torch.zeros(1, 3, *shape))
    codes = torch.zeros(1, 5, 4, dtype=torch.int64)
    assert model.decode(codes, grid=(4, 4)).shape == (1, 3, 64, 64)
    if grid != (4, 4):
        with pytest.raises(UserError, match=r"grid = \(8, 8\) does not fit 5 visual tokens of 4 x 4 patches"):
            model.decode(codes, grid=grid)
    for count in (4, 16):
        with pytest.raises(UserError, match=f"codes have {count} visual tokens; expected 5"):
            model.decode(torch.zeros(1, count, 4, dtype=torch.int64))


BAD = {
    "no queries": ({"token_layout": None}, "decoder 'resampled' needs the number .* columns: 4, tokens"),
    "0 queries": ({"token_layout": LAYOUT | {"tokens": 0}}, "needs the number of its query tokens"),
    "registers": (
        {"token_layout": LAYOUT | {"registers": 2}},
        "num_register_tokens = 2: decoder 'resampled' has queries instead, set it to 0",
    ),
    "queries of queries": (
        {"decoder_options": {"decoder": "resampled"}},
        "decoder_options.decoder is 'resampled': query tokens of query tokens",
    ),
    "an encoder alone": ({"decoder": "vitamin"}, "tokens = 5, but decoder 'vitamin' has one token per cell"),
    "a decoder alone": ({"encoder": "vitamin"}, "tokens = 5, but encoder 'vitamin' has one token per cell"),
    "scales": (
        {
            "quantizer": "residual",
            "quantizer_options": {"scales": [1, 2, 4]},
        },
        "token_layout.tokens = 5 together with scales",
    ),
    "a grid that is not the image's": (
        {"token_layout": {"rows": 2, "columns": 2, "tokens": 5}},
        "image_size = 64 is not the longer side of 2 x 2 tokens",
    ),
    "heads": ({"encoder_options": {"query_heads": 5}}, "encoder_options.query_heads is 5: it must divide"),
    "layers": ({"decoder_options": {"query_layers": 0}}, "decoder_options.query_layers is 0"),
    "a mistyped option": (
        {"encoder_options": {**VIT, "query_layer": 2}},
        "encoder_options.query_layer is not an option of encoder 'resampled'.*query_layers",
    ),
    "an option of the inner encoder": (
        {"encoder_options": {"hiden_size": 8}},
        "encoder_options.hiden_size is not an option of encoder 'vitamin'.*hidden_size",
    ),
    "another inner encoder": ({"encoder_options": {"encoder": "vit"}}, "encoder 'vit' is not known"),
    "what to read": (
        {"encoder_options": {"query_reads": "all"}},
        "encoder_options.query_reads is 'all': it must be output or layers",
    ),
    "layers to read": (
        {"encoder_options": {"query_reads": "layers", "query_layers": 2}},
        "query_layers = 2, but the inner encoder has 3 layers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", BAD)
def test_wrong_options_are_named(build, wrong):
    changes, message = BAD[wrong]
    with pytest.raises(UserError, match=message):
        build(**{"token_layout": LAYOUT, **changes})


def test_the_vit_decoder_alone_takes_other_grids_and_registers(tiny_config):
    torch.manual_seed(0)
    options = {"num_hidden_layers": 1}
    model = UniTok(tiny_config(decoder="vit", decoder_options=options, num_register_tokens=2)).eval()
    assert model.decoder.last_weight is model.decoder.to_pixels.weight
    codes = model.encode(torch.rand(1, 3, 32, 48) * 2 - 1)
    assert codes.shape == (1, 2 + 6, 4) and model.decode(codes, (2, 3)).shape == (1, 3, 32, 48)
    # the linear map of a patch fills that patch, row by row
    with torch.no_grad():
        model.decoder.to_pixels.weight.zero_()
        model.decoder.to_pixels.bias.copy_(torch.arange(3 * 16 * 16))
    found = model.decoder(torch.zeros(1, 8, 64), (2, 3))
    patch = torch.arange(3 * 16 * 16.0).view(3, 16, 16)
    assert torch.equal(found, patch.repeat(1, 2, 3)[None])


def squares(count: int, generator: torch.Generator) -> torch.Tensor:
    """Squares of random colours and places."""
    images = torch.full((count, 3, 32, 32), 0.8)
    for image in images:
        row, column = torch.randint(0, 18, (2,), generator=generator).tolist()
        colour = torch.rand(3, 1, 1, generator=generator) * 2 - 1
        image[:, row : row + 14, column : column + 14] = colour
    return images


@pytest.mark.slow
def test_queries_learn_what_is_where(tiny_config):
    """Half of the mean image's error in 400 steps; from weights of .02 it stays at that error."""
    torch.manual_seed(0)
    queries = {"query_layers": 2, "query_heads": 2}
    layout = {"rows": 4, "columns": 4, "tokens": 16}
    model = UniTok(
        tiny_config(
            image_size=32,
            patch_size=8,
            num_hidden_layers=1,
            encoder="resampled",
            encoder_options={**VIT, **queries, "hidden_size": 64, "intermediate_size": 128},
            decoder="resampled",
            decoder_options={**queries, "decoder": "vit"},
            token_layout=layout,
            codebook_size=32,
        )
    ).train()
    generator = torch.Generator().manual_seed(0)
    held_out = squares(64, generator)
    mean_error = (held_out - held_out.mean(dim=0)).square().mean().item()
    with torch.no_grad():  # rows from latents, as `codebooks.init_images`
        latents = model.encode_latents(held_out).flatten(0, 1)
        chosen = latents[torch.randperm(len(latents), generator=generator)[:32]]
        model.quantizer.codebooks.copy_(chosen.unflatten(-1, (4, 4)).transpose(0, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    for _ in range(400):
        images = squares(16, generator)
        out = model(images)
        loss = (out.reconstruction - images).square().mean() + out.losses["vq"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
    with torch.no_grad():
        error = (model.eval()(held_out).reconstruction - held_out).square().mean().item()
    assert error < 0.7 * mean_error
