"""The adversarial losses of stage 1, for discriminator and tokenizer (arXiv 2502.20321, section 3.1).

With consistency regularisation (bCR, arXiv 2002.04724) and VQGAN's adaptive weight (arXiv 2012.09841, eq. 7).
Pure functions of tensors and of draws made beforehand. B images, M logits per image.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_unitok.core import distributed
from open_unitok.core.errors import UserError, did_you_mean

from ..data.seeding import torch_generator
from .diff_augment import CUTOUT, Draws, augment, draw
from .discriminator import Crop, Discriminator

# What real logits are driven to; fakes take the same with the sign turned. All are means over logits.
CRITERIA: dict[str, Callable[[Tensor], Tensor]] = {
    "hinge": lambda logits: F.relu(1 - logits).mean(),
    "softplus": lambda logits: F.softplus(-logits).mean(),
    "linear": lambda logits: -logits.mean(),
}
# Where the adaptive weight is kept, by its published number; 3 then takes the root.
LIMITS = {0: (0.0, 1e4), 1: (0.015, 1e4), 2: (0.1, 10.0), 3: (0.0, 1e4), 4: (0.015, 1.5)}
LOOKS = ("generator", "real", "fake", "strong_real", "strong_fake")  # the discriminator's looks in one step


class Look(NamedTuple):
    """The chance in one look of the discriminator at a batch."""

    draws: Draws
    crop: Crop


class DiscriminatorLoss(NamedTuple):
    """What `discriminator_loss` gives: scalars."""

    total: Tensor  # to go backward from
    adversarial: Tensor  # detached, like all below
    consistency: Tensor  # weighted
    accuracy_real: Tensor  # per cent of logits on the right side of 0
    accuracy_fake: Tensor


def draw_looks(
    discriminator: Discriminator, seed: int, step: int, samples: Sequence[int], size: tuple[int, int]
) -> dict[str, Look]:
    """All the chance of one step, by the names in `LOOKS`.

    Args:
        samples: numbers of the images in the global batch; see `diffaug.draw`.
        size: (height, width) in pixels.
    """
    return {
        name: Look(
            draw(seed, step, name, samples),
            discriminator.draw_crop(*size, torch_generator(seed, "crop", step, name)),
        )
        for name in LOOKS
    }


def generator_loss(
    discriminator: Discriminator,
    reconstruction: Tensor,
    look: Look,
    blur: float = 0.0,
    probability: float = 1.0,
    cutout: float = CUTOUT,
) -> Tensor:
    """Minus the mean logit of (B, 3, H, W) reconstructions; the gradient goes to them alone.

    Args:
        blur: strength of the blur that fades out in the discriminator's first steps.
        probability, cutout: of the augmentation; see `diffaug.augment`.
    """
    with frozen(discriminator):
        shown = augment(reconstruction, look.draws, probability, cutout, blur)
        return -discriminator(shown, look.crop).mean()


def discriminator_loss(
    discriminator: Callable[[Tensor, Crop], Tensor],
    real: Tensor,
    fake: Tensor,
    looks: dict[str, Look],
    kind: str = "hinge",
    consistency: float = 4.0,
    blur: float = 0.0,
    probability: float = 1.0,
    cutout: float = CUTOUT,
) -> DiscriminatorLoss:
    """Tell (B, 3, H, W) real images from reconstructions, and judge an image alike however it is augmented.

    Args:
        discriminator: the module, or the engine around it.
        kind: one of `CRITERIA`.
        consistency: weight of the second term (0 leaves it out); its gradient goes through both judgements.

    Raises:
        UserError: there is no such kind.
    """
    if kind not in CRITERIA:
        raise UserError(f"There is no discriminator loss {kind!r}." + did_you_mean(kind, CRITERIA))
    images = {"real": real, "fake": fake.detach()}
    logits = {}
    for name, image in images.items():
        look = looks[name]
        logits[name] = discriminator(augment(image, look.draws, probability, cutout, blur), look.crop)
    total = adversarial = CRITERIA[kind](logits["real"]) + CRITERIA[kind](-logits["fake"])
    agreement = torch.zeros_like(adversarial)
    if consistency:
        for name, image in images.items():
            look = looks[f"strong_{name}"]
            strong = discriminator(augment(image, look.draws), look.crop)
            agreement = agreement + consistency * F.mse_loss(strong, logits[name])
        total = adversarial + agreement
    return DiscriminatorLoss(
        total,
        adversarial.detach(),
        agreement.detach(),
        100 * (logits["real"].detach() > 0).float().mean(),
        100 * (logits["fake"].detach() < 0).float().mean(),
    )


def adaptive_weight(
    reconstruction_loss: Tensor, generator_loss: Tensor, last_layer: Tensor, kind: int = 1
) -> Tensor:
    """How much to scale `generator_loss` so that it moves the last layer as much as the reconstruction does.

    The ratio of the two gradients' lengths at `last_layer`, each gradient averaged over ranks, kept within
    `LIMITS[kind]`; no gradient flows through it. The graphs of both losses stay.

    Raises:
        UserError: there is no such kind.
    """
    if kind not in LIMITS:
        raise UserError(f"There is no adaptive weight {kind!r}: the kinds are {', '.join(map(str, LIMITS))}.")
    lengths = []
    for loss in (reconstruction_loss, generator_loss):
        (gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
        lengths.append((distributed.sum_over_ranks(gradient.float()) / distributed.world_size()).norm())
    weight = (lengths[0] / (lengths[1] + 1e-6)).clamp(*LIMITS[kind])
    return weight.sqrt() if kind == 3 else weight


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within it, `module` is in evaluation mode and what it computes gives its parameters no gradient."""
    training = module.training
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        module.train(training)
