"""Parity with the published implementation, on tiny models with its weights."""

import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from open_unitok.tokenizer.convert import _NAMES, codes_from_published, rename

VARIANTS = ("attn", "linear", "attn_altsize", "attn_numquery4")
CLOSE = {"rtol": 0, "atol": 2e-5}


@pytest.fixture(params=VARIANTS)
def case(request, variant):
    return variant(request.param)


def test_codes_and_tensors(case):
    model, out = case.model, case.out
    with torch.no_grad():
        tokens = model.encoder(out["image"])
        latents = model.encode_latents(out["image"])
        quantised = model.quantizer(latents)
    codes = codes_from_published(out["indices"])
    assert torch.equal(quantised.codes, codes)
    assert torch.equal(model.encode(out["image"]), codes)
    torch.testing.assert_close(tokens, out["encoder_tokens"], **CLOSE)
    torch.testing.assert_close(latents, out["quant_proj_out"], **CLOSE)
    torch.testing.assert_close(quantised.quantised, out["quantizer_forward"], **CLOSE)
    torch.testing.assert_close(model.quantizer.embed(codes), out["dequant"], **CLOSE)
    torch.testing.assert_close(model.up_project(out["dequant"]), out["post_quant_proj_out"], **CLOSE)
    raw = model.decode_latents(out["dequant"], (out["image"].shape[2] // 16,) * 2)
    torch.testing.assert_close(raw, out["decoder_raw"], **CLOSE)
    torch.testing.assert_close(model.decode(codes), out["decoder_raw"].clamp(-1, 1), **CLOSE)


def test_embeddings(case):
    model, out = case.model, case.out
    torch.testing.assert_close(model.embed_image(out["image"]), out["encode_image_norm"], **CLOSE)
    torch.testing.assert_close(model.embed_text(out["text"]), out["encode_text_norm"], **CLOSE)


def test_intermediate_values(variant):
    case = variant("attn")
    model, out = case.model, case.out
    image = out["image"][:1]
    torch.testing.assert_close(model.encoder.stem(image), out["mid_stem"], **CLOSE)
    patches = model.encoder.patches(image)
    torch.testing.assert_close(patches, out["mid_patch_embed"], **CLOSE)
    first = model.encoder.blocks[0](patches + model.encoder.position_offset)
    torch.testing.assert_close(first, out["mid_enc_block0"], **CLOSE)
    map = out["mid_dec_norm"].transpose(1, 2).unflatten(2, (4, 4))
    for part, name in (("enter", "mid_dec_up1"), ("wide", "mid_dec_up2"), ("narrow", "mid_dec_up3")):
        map = getattr(model.decoder, part)(map)
        torch.testing.assert_close(map, out[name], **CLOSE)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
def test_forward(case, training, entropy):
    model, out = case.model.train(training), case.out
    name = f"fwd_{'train' if training else 'eval'}_{'ent' if entropy else 'noent'}"
    result = model(out["image"], out["text"], entropy=entropy)
    expected = case.meta[name]
    assert result.losses["vq"].item() == pytest.approx(expected["vq_loss"], abs=2e-6)
    assert result.losses["entropy"].item() == pytest.approx(expected["entropy_loss"], abs=2e-5)
    assert result.usage.shape == (4,)
    assert result.usage.mean().item() == pytest.approx(expected["codebook_usages"])
    assert result.logit_scale.item() == pytest.approx(expected["logit_scale"])
    torch.testing.assert_close(result.image_embeds, out[f"{name}.clip_image_features"], **CLOSE)
    torch.testing.assert_close(result.text_embeds, out[f"{name}.clip_text_features"], **CLOSE)
    if f"{name}.img_rec" in out:
        torch.testing.assert_close(result.reconstruction, out[f"{name}.img_rec"], **CLOSE)


def test_reconstruct_first(variant):
    case = variant("attn")
    result = case.model.train()(case.out["image"], reconstruct_first=2)
    torch.testing.assert_close(result.reconstruction, case.out["fwd_train_vae_bs2.img_rec"], **CLOSE)
    assert result.text_embeds is None and result.image_embeds.shape == (3, 32)
    assert case.model(case.out["image"], reconstruct_first=0).reconstruction is None


def losses(case, entropy: bool) -> dict[str, torch.Tensor]:
    """The terms of the golden total loss; negatives come from the batch."""
    out = case.out
    result = case.model(out["image"], out["text"], entropy=entropy)
    logits = result.logit_scale * result.image_embeds @ result.text_embeds.T
    target = torch.arange(len(logits))
    return {
        "L1": F.l1_loss(result.reconstruction, out["image"]),
        "L2": F.mse_loss(result.reconstruction, out["image"]),
        "Lvq": result.losses["vq"],
        "Lent": result.losses["entropy"],
        "Lclip": (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2,
    }


@pytest.mark.parametrize("entropy", [False, True])
def test_losses_and_gradients(case, entropy):
    terms = losses(case, entropy)
    expected = case.meta["loss_ent" if entropy else "loss_noent"]
    for name, value in terms.items():
        assert value.item() == pytest.approx(expected[name], rel=1e-5, abs=2e-5), name
    weights = {"L1": 0.2, "L2": 1, "Lvq": 1, "Lent": 0.1, "Lclip": 1}
    sum(weights[name] * value for name, value in terms.items()).backward()
    gradients = published_gradients(case.model)
    norms = case.meta["grad_norm_ent" if entropy else "grad_norm_noent"]
    for name, norm in norms.items():
        if norm is None:
            assert name not in gradients
        else:
            assert gradients.pop(name).norm().item() == pytest.approx(norm, rel=1e-5, abs=1e-6), name
    assert not gradients
    if not entropy:
        gradients = published_gradients(case.model)
        for name, tensor in case.out.items():
            if name.startswith("grad."):
                torch.testing.assert_close(gradients[name[5:]], tensor, rtol=1e-4, atol=2e-5)


def published_gradients(model) -> dict[str, torch.Tensor]:
    names_back = {ours: theirs for theirs, ours in _NAMES.items()}
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name == "quantizer.codebooks":
            found |= {f"quantizer.codebooks.{i}.codebook.weight": g for i, g in enumerate(parameter.grad)}
            continue
        theirs = rename(name, names_back)
        assert theirs is not None, name
        found[theirs] = parameter.grad.T if name == "text_encoder.projection.weight" else parameter.grad
    return found


def test_usage_statistics(case):
    quantizer, out = case.model.quantizer.train(), case.out
    with torch.no_grad():
        first = case.model.encode_latents(out["image"])
        # Only one golden file has the second image of these calls.
        if "image2" not in out:
            quantizer(first)
            torch.testing.assert_close(quantizer.usage, out["vocab_usage_after1"])
            return
        second = case.model.encode_latents(out["image2"])
        for call in range(1, 102):
            latents = first if call == 1 else second if call in (2, 101) else first[:1]
            result = quantizer(latents)
            if call == 2:
                assert result.usage.mean().item() == pytest.approx(out["codebook_usages_call2"].item())
            if call in (1, 2, 100, 101):
                expected = out[f"vocab_usage_after{call}"]
                torch.testing.assert_close(quantizer.usage, expected, rtol=1e-5, atol=1e-7)


def test_evaluation_does_not_update_usage(variant):
    case = variant("attn")
    before = case.model.quantizer.usage.clone()
    case.model(case.out["image"])
    case.model.encode(case.out["image"])
    assert torch.equal(case.model.quantizer.usage, before) and case.model.quantizer.calls == 0


def test_zeroshot(variant, golden_folder):
    case = variant("attn")
    golden = load_file(golden_folder / "zeroshot.safetensors")
    with torch.no_grad():
        texts = case.model.embed_text(golden["texts_tokens"]).unflatten(0, (5, 3)).mean(dim=1)
        classifier = F.normalize(texts, dim=-1).T
        logits = 100 * case.model.embed_image(case.out["image"]) @ classifier
    torch.testing.assert_close(classifier, golden["classifier"], **CLOSE)
    torch.testing.assert_close(logits, golden["logits"], rtol=0, atol=1e-3)


def test_every_golden_variant_is_tested(golden_folder):
    found = {re.sub(r"\.meta\.json$", "", path.name) for path in golden_folder.glob("*.meta.json")}
    assert found == set(VARIANTS)
