"""A training step on a GPU: losses, gradients and updated weights are those of the CPU."""

import copy

import pytest
import torch

from open_unitok.tokenizer.frozen.lpips import LPIPS
from open_unitok.training.core.deepspeed_engine import enable_activation_checkpointing
from open_unitok.training.tokenizer.losses import contrastive_loss, reconstruction_losses

pytestmark = pytest.mark.gpu
STEPS, LR, SIDE = 2, 1e-3, 32
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}


def tokenizer_loss(model, device):
    """Every loss of one micro-batch without a discriminator."""
    generator = torch.Generator().manual_seed(0)
    pixels = (torch.rand(2, 3, SIDE, SIDE, generator=generator) * 2 - 1).to(device)
    ids = torch.randint(1, 64, (2, 16), generator=generator).to(device)
    torch.manual_seed(0)
    lpips = LPIPS().to(device)

    def loss():
        out = model(pixels, ids, entropy=True)
        losses = reconstruction_losses(out.reconstruction, pixels)
        losses["lpips"] = lpips(out.reconstruction, pixels).mean()
        losses["clip"] = contrastive_loss(out.image_embeds, out.text_embeds, out.logit_scale)
        return sum(losses.values()) + out.losses["vq"] + 0.1 * out.losses["entropy"]

    return loss


def packed_rows(config, device):
    """Two rows of three samples each: text to image, a question about an image, text."""
    generator, image = torch.Generator().manual_seed(0), [config.image_token_id] * config.num_image_tokens
    samples = [
        ([1, 5, 6, 3, *image, 2], [-100] * 3 + [3, *image, 2]),
        ([1, *image, 9, 10, 11, 2], [-100] * (1 + len(image)) + [9, 10, 11, 2]),
        ([1, 5, 6, 7, 8], [1, 5, 6, 7, 8]),
    ]
    ids = [token for sample in samples for token in sample[0]]
    labels = [label for sample in samples for label in sample[1]]
    positions = [i for sample in samples for i in range(len(sample[0]))]
    shape = (4, config.num_image_tokens, config.num_codebooks)
    batch = {name: torch.tensor([row, row]) for name, row in
             (("input_ids", ids), ("labels", labels), ("position_ids", positions))}  # fmt: skip
    batch["image_codes"] = torch.randint(config.codebook_size, shape, generator=generator)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def mllm_loss(model, device):
    batch = packed_rows(model.config, device)
    return lambda: model(**batch, return_logits=False).loss


def train(model, build_loss, device, dtype=None):
    """Losses of some steps of AdamW, and the gradients of the first one, both on the CPU."""
    model = copy.deepcopy(model).to(device).train()
    loss_of, losses, gradients = build_loss(model, device), [], {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    for step in range(STEPS):
        with torch.autocast(device, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = loss_of()
        loss.backward()
        if not step:
            gradients = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses, gradients


@pytest.mark.parametrize("stage", ["tokenizer", "mllm"])
def test_training_steps_equal_those_of_the_cpu(tokenizer, mllm, caller_sets, stage):
    model, build_loss = (
        (tokenizer(image_size=SIDE), tokenizer_loss) if stage == "tokenizer" else (mllm(), mllm_loss)
    )
    expected, gradients = train(model, build_loss, "cpu")
    with caller_sets("highest"):
        found, found_gradients = train(model, build_loss, "cuda")
    assert found == pytest.approx(expected, rel=1e-3)
    assert expected[-1] != pytest.approx(expected[0], rel=1e-3)  # the weights were updated
    assert gradients.keys() == found_gradients.keys() and len(gradients) > 10
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item()
        difference = (found_gradients[name] - gradient).abs().max().item()
        assert difference <= 1e-2 * scale + 1e-6, name


@pytest.mark.parametrize("stage", ["tokenizer", "mllm"])
def test_autocast_stays_close_to_float32(tokenizer, mllm, stage):
    model, build_loss = (
        (tokenizer(image_size=SIDE), tokenizer_loss) if stage == "tokenizer" else (mllm(), mllm_loss)
    )
    exact, _ = train(model, build_loss, "cuda")
    rounded, _ = train(model, build_loss, "cuda", torch.bfloat16)
    assert rounded[0] == pytest.approx(exact[0], rel=5e-2)
    assert all(torch.tensor(rounded).isfinite())


@pytest.mark.parametrize("stage", ["tokenizer", "mllm"])
def test_activation_checkpointing_changes_no_gradient(tokenizer, mllm, stage):
    model, build_loss = (
        (tokenizer(image_size=SIDE), tokenizer_loss) if stage == "tokenizer" else (mllm(), mllm_loss)
    )
    expected, gradients = train(model, build_loss, "cuda", torch.bfloat16)
    enable_activation_checkpointing(model)
    found, found_gradients = train(model, build_loss, "cuda", torch.bfloat16)
    assert found == pytest.approx(expected, rel=1e-3)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=2e-2, atol=1e-4, msg=name)
