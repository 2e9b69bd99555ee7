"""All losses of the tokenizer stage and their weighted sum (arXiv 2502.20321, section 3.1).

Losses are dicts by name; the weight of a loss has the same name in `LossWeights`. The quantiser's losses come
from `Quantizer.forward`, the adaptive weight of the generator loss from `gan.py`.

B images of this rank, G images of all ranks, E width of the joint image-text space, M logits per image.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_unitok.core import distributed
from open_unitok.core.errors import UserError, did_you_mean
from open_unitok.tokenizer.frozen.lpips import LPIPS, MIN_SIZE
from open_unitok.tokenizer.precision import exact_float32

from ..core.collectives import all_gather_with_grad
from .diff_augment import CUTOUT, View, augment


def weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Sum of weight x loss; losses of weight 0 stay out of the graph.

    Raises:
        UserError: a loss without a weight, or a weight above 0 without a loss.
    """
    for name in losses:
        if name not in weights:
            raise UserError(
                f"Loss {name!r} has no weight; there are weights for {', '.join(weights)}. Give it one: "
                f"losses.extra='{{{name}: 1.0}}', or 0 to leave it out."
            )
    for name, weight in weights.items():
        if weight and name not in losses:
            raise UserError(
                f"losses.{name} is {weight}, but this model has no loss {name!r}, only "
                f"{', '.join(losses)}: set losses.{name} to 0."
            )
    # a loss of weight 0 may be infinite: 0 x inf would be NaN
    parts = [weights[name] * loss for name, loss in losses.items() if weights[name]]
    return torch.stack(parts).sum() if parts else torch.zeros(())


def reconstruction_losses(reconstruction: Tensor, pixels: Tensor) -> dict[str, Tensor]:
    """L1 and L2 per pixel; `reconstruction` (b, 3, H, W) belongs to the first b images of `pixels`."""
    difference = reconstruction.float() - pixels[: len(reconstruction)]
    return {"l1": difference.abs().mean(), "l2": difference.square().mean()}


def build_lpips(weights: str | None, image_shape: tuple[int, int], device: torch.device) -> Any:
    """The perceptual loss "lpips" (arXiv 1801.03924) with its published weights.

    Raises:
        UserError: no such weights; images too small for its deepest features.
    """
    lpips = LPIPS.from_file(weights).to(device)
    if min(image_shape) < MIN_SIZE:
        raise UserError(
            f"losses.lpips needs images of {MIN_SIZE} pixels or more a side, but the model's are "
            f"{image_shape[0]} x {image_shape[1]}: set losses.lpips to 0."
        )
    return lpips


def contrastive_loss(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP loss of this rank's (B, E) pairs against all G pairs (arXiv 2103.00020, section 2.3).

    Its mean over ranks is the loss of the global batch.
    """
    all_images, all_texts = all_gather_with_grad(image_embeds), all_gather_with_grad(text_embeds)
    count = len(image_embeds)
    # the match of local row i is row rank * B + i of the gathered batch
    labels = torch.arange(count, device=image_embeds.device) + distributed.rank() * count
    with exact_float32(image_embeds.device):  # a scale of up to 100 enlarges what TF32 would round
        by_image = F.cross_entropy(logit_scale * image_embeds @ all_texts.T, labels)
        by_text = F.cross_entropy(logit_scale * text_embeds @ all_images.T, labels)
    return (by_image + by_text) / 2


# ---- GAN: the generator's and the discriminator's losses -------------------------------------------------

# Loss of logits of real images; logits of reconstructions enter negated. All are means over (B, M).
GAN_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "hinge": lambda logits: F.relu(1 - logits).mean(),
    "hinge_half": lambda logits: 0.5 * F.relu(1 - logits).mean(),  # IBQ, FQGAN
    "softplus": lambda logits: F.softplus(-logits).mean(),
    "linear": lambda logits: -logits.mean(),
}

# Loss of (B, M) logits of reconstructions, for the generator.
GENERATOR_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda logits: -logits.mean(),
    "nonsaturating": lambda logits: F.softplus(-logits.flatten(1).mean(dim=1)).mean(),  # IBQ
}


class LeCam:
    """LeCam regularisation (arXiv 2104.03310): logits stay near the running mean of the other class.

    Attributes:
        real, fake: running means of the logits over the global batch, 0 at first.
    """

    def __init__(self, decay: float = 0.999) -> None:
        self.decay, self.real, self.fake = decay, 0.0, 0.0

    def __call__(self, real: Tensor, fake: Tensor) -> Tensor:
        """Move the running means by logits of real images and of reconstructions, then compare with them."""
        means = torch.stack([real.detach().float().mean(), fake.detach().float().mean()])
        found = (distributed.sum_over_ranks(means) / distributed.world_size()).tolist()
        self.real = self.decay * self.real + (1 - self.decay) * found[0]
        self.fake = self.decay * self.fake + (1 - self.decay) * found[1]
        return F.relu(real - self.fake).square().mean() + F.relu(self.real - fake).square().mean()

    def state_dict(self) -> dict[str, float]:
        return {"real": self.real, "fake": self.fake}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.real, self.fake = state["real"], state["fake"]


def generator_loss(
    discriminator: nn.Module,
    reconstruction: Tensor,
    view: View,
    blur: float = 0.0,
    probability: float = 1.0,
    cutout: float = CUTOUT,
    kind: str = "mean",
) -> Tensor:
    """Loss of the logits of (B, 3, H, W) reconstructions; the discriminator receives no gradient.

    Args:
        blur, probability, cutout: see `augment`.
        kind: one of `GENERATOR_LOSSES`; "mean" is the negative mean logit.
    """
    with frozen(discriminator):
        augmented = augment(reconstruction, view.noise, probability, cutout, blur)
        return GENERATOR_LOSSES[kind](discriminator(augmented, view.crop))


class DiscriminatorLoss(NamedTuple):
    """Scalars of one discriminator pass."""

    total: Tensor  # the only one with a graph
    adversarial: Tensor
    consistency: Tensor  # weighted
    accuracy_real: Tensor  # per cent of logits on the right side of 0
    accuracy_fake: Tensor
    lecam: Tensor  # weighted


def discriminator_loss(
    discriminator: Callable[..., Tensor],
    real: Tensor,
    fake: Tensor,
    views: Mapping[str, View],
    kind: str = "hinge",
    consistency: float = 4.0,
    blur: float = 0.0,
    probability: float = 1.0,
    cutout: float = CUTOUT,
    lecam: LeCam | None = None,
    lecam_weight: float = 0.0,
) -> DiscriminatorLoss:
    """Loss of classifying (B, 3, H, W) real images and reconstructions, with consistency regularisation.

    Args:
        discriminator: the module, or a forward pass through the engine around it.
        kind: one of `GAN_LOSSES`.
        consistency: weight of the balanced consistency regularisation (bCR, arXiv 2002.04724): the logits of
            an image and of its strong augmentation should be equal. Both receive a gradient; 0 omits it.
        lecam, lecam_weight: regularisation of the logits, None omits it.

    Raises:
        UserError: unknown `kind`.
    """
    if kind not in GAN_LOSSES:
        raise UserError(f"{kind!r} is not a discriminator loss.{did_you_mean(kind, GAN_LOSSES)}")
    # detached: the discriminator step must not reach the decoder
    images = {"real": real, "fake": fake.detach()}
    logits = {}
    for name, image in images.items():
        view = views[name]
        logits[name] = discriminator(augment(image, view.noise, probability, cutout, blur), view.crop)
    total = adversarial = GAN_LOSSES[kind](logits["real"]) + GAN_LOSSES[kind](-logits["fake"])
    agreement = torch.zeros_like(adversarial)
    if consistency:
        for name, image in images.items():
            view = views[f"strong_{name}"]
            strong = discriminator(augment(image, view.noise), view.crop)
            agreement = agreement + consistency * F.mse_loss(strong, logits[name])
        total = adversarial + agreement
    closeness = torch.zeros_like(adversarial)
    if lecam is not None:
        closeness = lecam_weight * lecam(logits["real"], logits["fake"])
        total = total + closeness
    return DiscriminatorLoss(
        total,
        adversarial.detach(),
        agreement.detach(),
        100 * (logits["real"].detach() > 0).float().mean(),
        100 * (logits["fake"].detach() < 0).float().mean(),
        closeness.detach(),
    )


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Context in which `module` is in evaluation mode and its parameters receive no gradient."""
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
