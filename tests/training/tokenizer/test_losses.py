"""The losses of stage 1 against golden values, each one and in three training steps with a discriminator."""

import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from open_unitok.core.errors import UserError
from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.tokenizer.convert import state_from_published
from open_unitok.training.core.deepspeed_engine import parameter_groups
from open_unitok.training.tokenizer.diff_augment import AugmentationNoise, View
from open_unitok.training.tokenizer.discriminator import PatchDiscriminator
from open_unitok.training.tokenizer.gan import ADAPTIVE_LIMITS, VIEWS, adaptive_weight
from open_unitok.training.tokenizer.losses import (
    GAN_LOSSES,
    contrastive_loss,
    discriminator_loss,
    frozen,
    generator_loss,
    reconstruction_losses,
    weighted_sum,
)


def test_gan_losses(values, numbers):
    logits = values["crit.logits"]
    for name, loss in GAN_LOSSES.items():
        found = [loss(logits).item(), loss(-logits).item()]
        wanted = numbers["crit"][f"{name.removesuffix('_half')}_loss"]
        assert found == pytest.approx([value / (1 + name.endswith("_half")) for value in wanted], rel=1e-6)


@pytest.mark.parametrize("limits", ADAPTIVE_LIMITS)
def test_adaptive_weight_is_clamped_as_published(limits):
    """The five published limits; "sqrt" takes the square root after clamping."""
    low, high = {
        "vqgan": (0, 1e4),
        "floor": (0.015, 1e4),
        "narrow": (0.1, 10),
        "sqrt": (0, 1e4),
        "capped": (0.015, 1.5),
    }[limits]
    for ratio in (1e-3, 0.5, 3.0, 1e5):
        last = torch.ones(4, requires_grad=True)
        found = adaptive_weight(ratio * last.sum(), -last.sum(), last, limits)
        wanted = min(max(ratio * 2 / (2 + 1e-6), low), high)
        assert found.item() == pytest.approx(math.sqrt(wanted) if limits == "sqrt" else wanted, rel=1e-5)
        assert not found.requires_grad and last.grad is None


def test_errors():
    last = torch.ones(1, requires_grad=True)
    with pytest.raises(UserError, match=r"adaptive is 'foor'\. Did you mean 'floor'"):
        adaptive_weight(last.sum(), last.sum(), last, "foor")
    with pytest.raises(UserError, match="Did you mean 'hinge'"):
        discriminator_loss(PatchDiscriminator(4, 1), torch.zeros(1), torch.zeros(1), {}, kind="hing")


def test_every_loss_needs_a_weight_and_every_weight_a_loss():
    losses = {"l1": torch.tensor(1.0), "commitment": torch.tensor(2.0)}
    weights = {"l1": 0.5, "entropy": 0.0}
    with pytest.raises(UserError, match=r"Loss 'commitment' has no weight.*for l1, entropy"):
        weighted_sum(losses, weights)
    assert weighted_sum(losses, {**weights, "commitment": 0.25}) == 1.0
    with pytest.raises(UserError, match=r"losses\.entropy is 0\.1, but.*only l1, commitment"):
        weighted_sum(losses, {**weights, "commitment": 0.25, "entropy": 0.1})


def test_frozen_restores_everything():
    model = PatchDiscriminator(4, 1)
    model.layers[0].bias.requires_grad_(False)
    with frozen(model):
        assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.training
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["layers.0.bias"]


# ---- three training steps as published -------------------------------------------------------------------


@pytest.fixture
def tiny_unitok(golden):
    published = torch.load(golden / "tokenizer" / "reference_ckpt.pth", weights_only=True)["trainer"][
        "unitok"
    ]
    sizes = {"stem_width": 16, "stage_widths": (16, 32), "stage_depths": (2, 4), "hidden_size": 64}
    sizes |= {"num_hidden_layers": 3, "num_attention_heads": 2, "decoder_widths": (32, 16), "image_size": 64}
    sizes |= {"num_codebooks": 4, "codebook_size": 64, "codebook_dim": 4, "embed_dim": 32}
    sizes |= {"text_hidden_size": 64, "text_num_layers": 2, "text_num_heads": 2}
    sizes |= {"text_vocab_size": 512, "text_context_length": 16}
    model = UniTok(UniTokConfig(**sizes))
    model.load_state_dict(state_from_published(published))
    return model.train()


def adam(module, lr, betas, decay):
    return torch.optim.AdamW(parameter_groups(module, decay), lr=lr, betas=betas, eps=1e-6)


def train_step(models, optimizers, batch, views, warmup, blur):
    """One published step: decode the first two images, contrast all; returns the metrics."""
    unitok, discriminator, lpips = models
    image, text = batch
    real = image[:2]
    out = unitok(image, text, reconstruct_first=2)
    plain = reconstruction_losses(out.reconstruction, image)
    perceptual = lpips(real, out.reconstruction).mean()
    nll = 0.2 * plain["l1"] + plain["l2"] + perceptual
    clip = contrastive_loss(out.image_embeds, out.text_embeds, out.logit_scale)
    total = nll + out.losses["vq"] + clip
    log = {"L1": plain["l1"], "Lpip": perceptual, "Lnll": nll, "Lq": out.losses["vq"], "Lc": clip}
    if warmup:
        gan = generator_loss(discriminator, out.reconstruction, views["generator"], blur)
        weight = warmup * 0.4 * adaptive_weight(nll, gan, unitok.decoder.to_pixels.weight)
        total = total + weight * gan
        log |= {"Lg": gan, "Wei_g": weight}
    log["Lv"] = total
    log["Gradnorm_g"] = update(optimizers[0], unitok, total)
    if warmup:
        judged = discriminator_loss(discriminator, real, out.reconstruction, views, blur=blur)
        log |= {"Ldisc": judged.adversarial, "Lbcr": judged.consistency}
        log |= {"Disc_accu_real": judged.accuracy_real, "Disc_accu_fake": judged.accuracy_fake}
        log["Gradnorm_d"] = update(optimizers[1], discriminator, judged.total)
    with torch.no_grad():
        unitok.logit_scale.clamp_(0, math.log(100))
    return {name: value.item() for name, value in log.items()} | {"usage": out.usage.mean().item()}


def update(optimizer, module, loss):
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 10.0)
    optimizer.step()
    return norm


def test_three_published_steps(
    tiny_unitok, small_discriminator, lpips, values, numbers, golden, recorded_noise
):
    discriminator = small_discriminator().train()
    optimizers = (
        adam(tiny_unitok, 5e-4, (0.9, 0.95), 0.02),
        adam(discriminator, 2e-5, (0.5, 0.9), 0.2),
    )
    inputs = load_file(golden / "tokenizer" / "attn.outputs.safetensors")
    for step, wanted in enumerate(numbers["train_steps"]):
        warmup, blur = wanted["warmup_disc_schedule"], wanted["fade_blur_schedule"]
        views = {}
        if warmup:
            views = {
                name: View(AugmentationNoise(*recorded_noise(step, i)), None) for i, name in enumerate(VIEWS)
            }
        models = (tiny_unitok, discriminator, lpips)
        found = train_step(models, optimizers, (inputs["image"], inputs["text"]), views, warmup, blur)
        logged = wanted["wandb"] | {"Lv": wanted["Lv"], "usage": wanted["wandb"]["Codebook_usage"]}
        # steps after the first are chaotic: 6e-8 in the weights changes some values by a fifth
        for name, value in found.items():
            exact = step == 0
            loose = name in ("Wei_g", "Gradnorm_g", "Gradnorm_d", "Lg", "Lbcr", "Ldisc", "Lc", "usage")
            limit = 1e-5 if exact else 0.2 if loose else None if name.startswith("Disc_accu") else 2e-3
            if limit is not None:
                assert value == pytest.approx(logged[name], rel=limit), (step, name)
        if step == 0:
            check_parameters(tiny_unitok, values, numbers)


def check_parameters(model, values, numbers):
    """The norm of every parameter, and all values of a few, after step 0."""
    found = {name: parameter.detach() for name, parameter in model.named_parameters()}
    prefix = "train.step0.param."
    wanted = state_from_published(
        {n.removeprefix(prefix): t for n, t in values.items() if n.startswith(prefix)}
    )
    assert len(wanted) == 6
    for name, tensor in wanted.items():
        ours = found[name]
        if name == "quantizer.codebooks":  # the golden file holds only the second one
            ours = ours[1:2]
        if name.endswith("qkv.bias"):  # the key bias has no gradient: Adam updates it with noise
            ours, tensor = (torch.cat((t[:64], t[128:])) for t in (ours, tensor))
        torch.testing.assert_close(ours, tensor, rtol=0, atol=5e-5, msg=name)
    # rename the norms like their parameters
    norms = numbers["train.step0.param_norms"]
    norms = {name: torch.tensor([[norm]]) for name, norm in norms.items() if ".codebooks." not in name}
    renamed = state_from_published(norms)
    assert found.keys() - renamed.keys() == {"quantizer.codebooks"}
    for name in found.keys() & renamed.keys():
        if not name.endswith("qkv.bias"):
            assert found[name].norm().item() == pytest.approx(renamed[name].item(), rel=2e-5, abs=5e-5), name


# ---- ranks -----------------------------------------------------------------------------------------------

RANKS = """
import os, sys
import torch, torch.distributed as dist
from open_unitok.core import distributed
from open_unitok.training.core.collectives import all_gather_with_grad, mean_over_ranks
from open_unitok.training.tokenizer.discriminator import PatchDiscriminator, RankBatchNorm
from open_unitok.training.tokenizer.gan import adaptive_weight, sample_views
from open_unitok.training.tokenizer.losses import contrastive_loss, discriminator_loss, generator_loss

size, rank = distributed.world_size(), distributed.rank()
if size > 1:
    dist.init_process_group("gloo")
torch.manual_seed(0)
model, last = PatchDiscriminator(4, 2), torch.nn.Conv2d(3, 3, 3, padding=1)
head, norm = torch.nn.Linear(12, 8), RankBatchNorm(3)
data, words = torch.rand(4, 3, 16, 16) * 2 - 1, torch.randn(4, 12)
mine = range(rank * 4 // size, (rank + 1) * 4 // size)
real, words = data[list(mine)], words[list(mine)]
fake = last(real)
views = sample_views(model, 5, 3, list(mine), (16, 16))
reconstruction = (fake - real).square().mean()
gan = generator_loss(model, fake, views["generator"], blur=0.3)
weight = adaptive_weight(reconstruction, gan, last.weight)
images = torch.nn.functional.normalize(head(fake.mean((2, 3)).repeat(1, 4)), dim=1)
texts = torch.nn.functional.normalize(head(words), dim=1)
clip = contrastive_loss(images, texts, torch.tensor(10.0))
judged = discriminator_loss(model, real, fake, views, blur=0.3)
mean = mean_over_ranks(fake.mean((0, 2, 3))).square().sum()
every = (all_gather_with_grad(images) @ all_gather_with_grad(texts).T).square().sum()
normal = norm(fake.flatten(2)).pow(3).mean()
(reconstruction + weight * gan + clip + judged.total + mean + every + normal).backward()
with torch.no_grad():
    shown = [reconstruction, gan, clip, judged.total, weight, mean, every, normal, norm.running_var.sum()]
    shown = [distributed.sum_over_ranks(value.double()) / size for value in shown]
    grads = [p.grad for m in (model, last, head, norm) for p in m.parameters()]
    shown += [(distributed.sum_over_ranks(g.double()) / size).norm() for g in grads]
if rank == 0:
    print(" ".join(f"{v.item():.9e}" for v in shown))
if size > 1:  # no interpreter shutdown, in which gloo's threads may abort
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)
"""


def run_ranks(count: int, port: int) -> list[float]:
    """The printed numbers of `count` processes that share the batch."""
    workers = []
    for rank in range(count):
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
        env |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        command = [sys.executable, "-c", RANKS]
        workers.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * count
    return [float(word) for word in outputs[0].split()]


@pytest.mark.slow
def test_two_ranks_equal_one_process(unused_port):
    """Losses, adaptive weight and every gradient, with random numbers keyed by the sample's number."""
    single, both = run_ranks(1, unused_port), run_ranks(2, unused_port)
    assert len(single) > 15
    # abs: the gradient of a bias before a norm is only rounding error
    assert both == pytest.approx(single, rel=1e-5, abs=1e-6)


@pytest.fixture
def unused_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
