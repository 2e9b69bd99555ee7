"""Losses that reach the tokenizer through its reconstructions alone: their networks run backward at once.

B images, H and W rows and columns.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# images of a piece: of LPIPS and the discriminator only a piece's activations are in memory
PIECE = 8


def loss_of_images(
    images: Tensor, loss: Callable[[Tensor, slice], Tensor], piece: int | None = None
) -> Tensor:
    """The loss of (B, 3, H, W) images, whose graph holds its gradient at the images in place of a network's
    activations.

    However often the result is differentiated, e.g. for the adaptive GAN weight, the network runs backward
    once. It has no second derivative.

    Args:
        loss: (images, their slice of the batch) -> scalar, the mean over images that are independent.
        piece: images that `loss` is called with at a time; None = all.
    """
    return _LossOfImages.apply(images, loss, piece or len(images))  # pyright: ignore[reportReturnType]


class _LossOfImages(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, loss: Callable[[Tensor, slice], Tensor], piece: int) -> Tensor:
        values, gradients = [], []
        for start in range(0, len(images), piece):
            part = slice(start, min(start + piece, len(images)))
            with torch.enable_grad():
                leaf = images[part].detach().requires_grad_()
                value = loss(leaf, part)
                if len(leaf) != len(images):
                    value = value * (len(leaf) / len(images))
            values.append(value.detach())
            gradients += torch.autograd.grad(value, leaf)
        ctx.save_for_backward(torch.cat(gradients) if len(gradients) > 1 else gradients[0])
        return torch.stack(values).sum() if len(values) > 1 else values[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        (at_images,) = ctx.saved_tensors
        return at_images * gradient, None, None
