"""The discriminators: golden logits and gradients, norms, weight files, the PatchGAN."""

import json

import pytest
import torch

from open_unitok.core.errors import UserError
from open_unitok.tokenizer.frozen.dinov2 import DINOv2
from open_unitok.training.tokenizer.diff_augment import augment
from open_unitok.training.tokenizer.discriminator import (
    DinoDiscriminator,
    GroupedBatchNorm,
    PatchDiscriminator,
    RankBatchNorm,
    build_discriminator,
)
from open_unitok.training.tokenizer.gan import sample_views
from open_unitok.training.tokenizer.losses import discriminator_loss, generator_loss

CLOSE = {"rtol": 0, "atol": 1e-5}


def test_golden_logits(small_discriminator, values, numbers):
    model = small_discriminator()
    with torch.no_grad():
        torch.testing.assert_close(
            model(values["disc.56.image"][..., :42, :42]), values["disc.42.logits"], **CLOSE
        )
        for size in (56, 64, 96):
            image = values[f"disc.{size}.image"]
            torch.testing.assert_close(model(image), values[f"disc.{size}.logits_area"], **CLOSE)
            if size != 56:
                crop = tuple(numbers[f"disc.{size}.crop_offsets_top_left"])
                torch.testing.assert_close(model(image, crop), values[f"disc.{size}.logits_crop"], **CLOSE)


@pytest.mark.parametrize("size", [56, 64, 96])
def test_golden_input_gradient(small_discriminator, values, numbers, size):
    image = values[f"disc.{size}.image"].clone().requires_grad_()
    small_discriminator()(image).mean().backward()
    assert image.grad.norm().item() == pytest.approx(numbers[f"disc.{size}.input_grad_norm"], rel=2e-5)


@pytest.mark.parametrize("norm, spectral_norm", [("gn", False), ("bn", False), ("gn", True)])
def test_names_of_the_published_files(golden, norm, spectral_norm):
    keys = json.loads((golden / "losses" / "loss_nets_keys.json").read_text())
    dino = DINOv2()
    wanted = keys[f"disc_norm={norm},specnorm={spectral_norm}"]
    model = DinoDiscriminator(dino, norm=norm, spectral_norm=spectral_norm)
    assert {n: list(t.shape) for n, t in model.state_dict().items()} == wanted["keys"]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(wanted["trainable"])
    assert sum(p.numel() for p in model.parameters()) == 7_386_245
    published = next(v for k, v in keys.items() if k.startswith("dinov2"))
    published = published.get("keys", published)
    unused = {"mask_token", "norm.weight", "norm.bias"}
    found = {n: list(t.shape) for n, t in dino.state_dict().items()}
    assert found == {n: s for n, s in published.items() if n not in unused}


def test_dino_is_frozen_and_moves_along(small_discriminator):
    model = small_discriminator().to(torch.float64)
    assert model.dino.cls_token.dtype == torch.float64
    assert not any("dino" in name for name, _ in model.named_parameters())
    model = small_discriminator().train()
    model(torch.zeros(1, 3, 28, 28)).sum().backward()
    assert not model.dino.training
    assert all(p.grad is None for p in model.dino.parameters())
    assert all(p.grad is not None for p in model.parameters())


def test_sampled_crops(small_discriminator):
    model, generator = small_discriminator(), torch.Generator().manual_seed(0)
    crops = [model.sample_crop(64, 67, generator) for _ in range(200)]
    chosen = [crop for crop in crops if crop is not None]
    assert 70 < len(chosen) < 130
    assert {top for top, _ in chosen} == set(range(9)) and {left for _, left in chosen} == set(range(12))
    assert {model.sample_crop(64, 56, generator) for _ in range(20)} == {None}


def test_dino_reads_the_layout_of_transformers(small_dino, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    torch.manual_seed(0)
    theirs = transformers.Dinov2Model(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path)
    dino = DINOv2.from_file(tmp_path, heads=2)
    image = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        wanted = theirs(image, output_hidden_states=True).hidden_states
        found = dino(image, (0, 1))
    for depth in (0, 1):
        torch.testing.assert_close(found[depth], wanted[depth + 1], rtol=1e-5, atol=1e-5)


def test_dino_file(small_dino, tmp_path):
    for path in (None, tmp_path, tmp_path / "no.pth"):
        with pytest.raises(UserError, match=r"dinov2_vits14_pretrain\.pth.*huggingface\.co"):
            build_discriminator("dino", dino=path)
    dino = small_dino()
    weights = dino.state_dict() | {"mask_token": torch.zeros(1, 64)}
    torch.save(weights, tmp_path / "dinov2_vits14_pretrain.pth")
    loaded = DINOv2.from_file(tmp_path, heads=2)
    image = torch.randn(1, 3, 28, 42)
    assert torch.equal(loaded(image, (3,))[0], dino(image, (3,))[0])
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="not a DINOv2"):
        DINOv2.from_file(tmp_path / "other.pth")


def test_grouped_batch_norm():
    norm = GroupedBatchNorm(4)
    features = torch.randn(16, 4, 5)
    plain = torch.nn.BatchNorm1d(4, eps=1e-6).train()
    wanted = torch.cat([plain(part) for part in features.chunk(2)])
    torch.testing.assert_close(norm(features), wanted)
    torch.testing.assert_close(norm(features[:8]), plain(features[:8]))
    with pytest.raises(UserError, match="2 equal groups"):
        norm(features[:9])


def test_rank_batch_norm_on_one_rank_is_batch_norm():
    ours, plain = RankBatchNorm(4, eps=1e-6), torch.nn.BatchNorm1d(4, eps=1e-6)
    features = torch.randn(6, 4, 5)
    torch.testing.assert_close(ours(features), plain(features))
    torch.testing.assert_close(ours.eval()(features), plain.eval()(features))


def test_errors(small_dino):
    with pytest.raises(UserError, match="Did you mean 'patch'"):
        build_discriminator("pach")
    with pytest.raises(UserError, match="'ln' is not a discriminator norm"):
        DinoDiscriminator(small_dino(), depths=(0,), norm="ln")
    with pytest.raises(UserError, match="blocks 0 to 3"):
        DinoDiscriminator(small_dino())
    with pytest.raises(UserError, match="needs 14 or more"):
        DinoDiscriminator(small_dino(), depths=(0,))(torch.zeros(1, 3, 13, 28))
    with pytest.raises(UserError, match="needs 8 or more"):
        PatchDiscriminator()(torch.zeros(1, 3, 4, 32))


@pytest.mark.parametrize("kind", ["patch", "gn", "bn", "sbn", "spectral"])
def test_each_discriminator_trains(small_dino, kind):
    """Every kind builds, every parameter gets a gradient, and the loss falls."""
    torch.manual_seed(0)
    if kind == "patch":
        model = PatchDiscriminator(width=8, layers=2)
    elif kind == "spectral":
        model = DinoDiscriminator(small_dino(), depths=(0, 3), spectral_norm=True)
    else:
        model = DinoDiscriminator(small_dino(), depths=(0, 3), norm=kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.5, 0.9))
    real, fake = torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32).mul(0.3)
    losses = []
    for step in range(8):
        views = sample_views(model, 0, step, range(4), (32, 32))
        loss = discriminator_loss(model, real, fake, views, consistency=0.1)
        optimizer.zero_grad()
        loss.total.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.adversarial.item())
    assert losses[-1] < losses[0]


def test_patch_discriminator_and_generator_loss_gradients():
    model, image = PatchDiscriminator(width=4, layers=2), torch.rand(2, 3, 32, 48, requires_grad=True)
    view = sample_views(model, 0, 0, range(2), (32, 48))["generator"]
    loss = generator_loss(model, image, view)
    loss.backward()
    assert image.grad.abs().sum() > 0
    assert all(p.grad is None and p.requires_grad for p in model.parameters()) and model.training
    torch.testing.assert_close(loss, -model(augment(image, view.noise)).mean())
