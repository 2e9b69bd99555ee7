"""Losses of the reconstructions: the same values and gradients whether their networks run backward once, in
pieces, or in the graph."""

import functools

import pytest
import torch
from torch import Tensor, nn

from open_unitok.tokenizer.frozen.dinov2 import DINOv2
from open_unitok.tokenizer.frozen.lpips import LPIPS
from open_unitok.training.tokenizer.diff_augment import View
from open_unitok.training.tokenizer.discriminator import DinoDiscriminator, PatchDiscriminator
from open_unitok.training.tokenizer.gan import adaptive_weight, sample_views
from open_unitok.training.tokenizer.image_losses import loss_of_images
from open_unitok.training.tokenizer.losses import generator_loss, reconstruction_losses

IMAGES = 3


@functools.cache
def random_lpips() -> LPIPS:
    torch.manual_seed(0)
    lpips = LPIPS()
    for parameter in lpips.lins.parameters():  # distances are weighted by positive numbers
        parameter.data.abs_()
    return lpips


class Case:
    """A decoder of two layers, LPIPS and a discriminator with random weights."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        self.lpips = random_lpips()
        if kind == "patch":
            self.discriminator = PatchDiscriminator(8, 2)
        else:
            self.discriminator = DinoDiscriminator(DINOv2(32, 3, 2, grid=4), depths=(0, 2), kernel=3)
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
        self.pixels = torch.rand(IMAGES, 3, 56, 56) * 2 - 1
        self.views = sample_views(self.discriminator, 0, 3, range(IMAGES), (56, 56))
        self.forward, self.backward = 0, 0  # passes of LPIPS

    def count(self, _gradient: Tensor) -> None:
        self.backward += 1

    def perceptual(self, images: Tensor, part: slice) -> Tensor:
        self.forward += 1
        images = images * 1.0
        if images.requires_grad:
            images.register_hook(self.count)
        return self.lpips(images, self.pixels[part]).mean()

    def generator(self, images: Tensor, part: slice) -> Tensor:
        noise, crop = self.views["generator"]
        view = View(noise._replace(amounts=noise.amounts[:, part]), crop)
        return generator_loss(self.discriminator, images, view, blur=0.2)

    def step(self, piece: int | None, wrapped: bool) -> tuple[list[float], list[Tensor]]:
        """Losses and adaptive weight, and the gradients of the decoder."""
        images = self.last(torch.tanh(self.first(self.pixels)))
        if wrapped:
            lpips = loss_of_images(images, self.perceptual, piece)
            gan = loss_of_images(images, self.generator, piece)
        else:
            lpips, gan = self.perceptual(images, slice(None)), self.generator(images, slice(None))
        plain = reconstruction_losses(images, self.pixels)
        total = 0.2 * plain["l1"] + plain["l2"] + lpips
        weight = adaptive_weight(total, gan, self.last.weight, "vqgan")
        parameters = [*self.first.parameters(), *self.last.parameters()]
        gradients = torch.autograd.grad(total + weight * gan, parameters)
        return [float(value.detach()) for value in (lpips, gan, weight)], list(gradients)


@pytest.mark.parametrize("kind", ["patch", "dino"])
@pytest.mark.parametrize("autocast", [False, True])
def test_values_weight_and_gradients_are_the_same(kind, autocast):
    case = Case(kind)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, gradients = case.step(None, wrapped=False)
        # bfloat16 rounds gradients that pass through a network at another scale: alone it moves them by 0.3
        error = 0.1 if autocast else 1e-4
        for piece in (None, 2):
            values, found = case.step(piece, wrapped=True)
            assert values == pytest.approx(expected, rel=error / 10)
            for one, other in zip(found, gradients):
                assert (one - other).norm() < error * other.norm()


@pytest.mark.parametrize(("piece", "calls"), [(None, 1), (2, 2), (1, 3), (8, 1)])
def test_a_network_runs_backward_once(piece, calls):
    """Although the adaptive weight and the backward pass differentiate its loss twice."""
    case = Case("patch")
    case.step(piece, wrapped=True)
    assert case.forward == case.backward == calls
    case.step(None, wrapped=False)
    assert case.backward == calls + 2


def test_only_a_piece_of_the_images_is_in_memory():
    case, kept = Case("patch"), []
    images = case.pixels.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        loss = loss_of_images(images, case.perceptual, 1)
    assert {shape[0] for shape in kept if shape[-2:] == (56, 56) and shape[1] == 64} == {1}
    # what is left for the backward pass is the gradient at the images
    assert [tensor.shape for tensor in loss.grad_fn.saved_tensors] == [images.shape]  # pyright: ignore
