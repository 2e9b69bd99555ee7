"""The GAN of the tokenizer stage: discriminator, its engine and schedule, the two steps, the adaptive weight
(arXiv 2502.20321, section 4.1). The loss functions themselves are in `losses.py`.

B decoded images of this rank, H and W their rows and columns.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from open_unitok.core import distributed
from open_unitok.core.errors import UserError, did_you_mean

from ..core import deepspeed_engine, schedules
from ..data import seeding
from .config import TokenizerRunConfig
from .diff_augment import View, sample_noise
from .discriminator import Discriminator, build_discriminator
from .image_losses import PIECE, loss_of_images
from .losses import LeCam, discriminator_loss, generator_loss

# Bounds of the adaptive weight, see `DiscriminatorOptions.adaptive`.
ADAPTIVE_LIMITS = {
    "vqgan": (0.0, 1e4),
    "floor": (0.015, 1e4),
    "narrow": (0.1, 10.0),
    "sqrt": (0.0, 1e4),  # and then the square root
    "capped": (0.015, 1.5),
}
# The discriminator passes of one step; each has its own augmentation parameters.
VIEWS = ("generator", "real", "fake", "strong_real", "strong_fake")


class GAN:
    """Discriminator of a run; call `start_step` once a step, then per micro-batch `generator_step` and
    `discriminator_step`.

    Before step `discriminator.start` both return zeros, so that every metrics record has the same names.
    """

    def __init__(
        self,
        config: TokenizerRunConfig,
        image_shape: tuple[int, int],
        device: torch.device,
        micro_batch: int,
    ):
        self.options = options = config.discriminator
        self.max_weight = config.losses.adversarial
        self.total_steps, self.seed = config.steps, config.seed
        torch.manual_seed(seeding.derive_seed(config.seed, "discriminator"))
        self.module = build_discriminator(
            options.kind, options.weights, options.norm, options.spectral_norm, options.width, options.layers
        ).to(device)
        with torch.no_grad():  # a trial pass: rejects images that are too small before training starts
            self.module.eval()(torch.zeros(1, 3, *image_shape, device=device))
        # a second engine: DeepSpeed has one optimiser per engine
        groups = deepspeed_engine.parameter_groups(self.module, options.optimizer.weight_decay)
        self.engine = deepspeed_engine.build_engine(
            self.module, groups, options.optimizer, config.engine, micro_batch
        )
        self.module.train()
        self.step, self.weight, self.blur, self.lr = 0, 0.0, 1.0, 0.0
        self.grad_norm: Tensor | float = 0.0
        self.views: dict[str, View] = {}  # of the coming passes, see `sample_views`
        # all at once where activations are kept; "bn" compares the images of a whole batch
        pieces = config.engine.gradient_checkpointing and not (
            options.kind == "dino" and options.norm == "bn"
        )
        self.piece = PIECE if pieces else None
        self.lecam = LeCam() if options.lecam else None

    def start_step(self, step: int) -> None:
        """Set weight, blur and learning rate of step `step`; its own schedule counts from `start`."""
        options, own_step = self.options, step - self.options.start
        self.step, self.grad_norm = step, 0.0
        ramp = schedules.linear_ramp(own_step, options.warmup) if own_step >= 0 else 0.0
        self.weight = self.max_weight * ramp
        # the blur of all discriminator inputs fades over twice the warm-up
        self.blur = 1.0 - schedules.linear_ramp(own_step, 2 * options.warmup) if options.blur else 0.0
        schedule = options.schedule
        multiplier = schedules.lr_multiplier(
            schedule.kind,
            max(own_step, 0),
            self.total_steps - options.start,
            schedule.warmup,
            schedule.start,
            schedule.end,
        )
        self.lr = options.optimizer.lr * multiplier if self.weight else 0.0
        deepspeed_engine.set_lr_multiplier(self.engine, multiplier)

    def generator_step(
        self,
        reconstruction_loss: Tensor,
        reconstruction: Tensor,
        last_layer: Tensor,
    ) -> dict[str, Tensor]:
        """The generator loss "adversarial" and its weight "adversarial_weight"; needs `views`.

        Args:
            reconstruction_loss: weighted sum of the reconstruction losses, for the adaptive weight.
            reconstruction: (B, 3, H, W).
            last_layer: last weight of the decoder, at which gradients are compared.
        """
        if not self.weight:
            zero = reconstruction.new_zeros(())
            return {"adversarial": zero, "adversarial_weight": zero}
        options = self.options
        with deepspeed_engine.autocast(self.engine):
            if self.balances or self.piece:
                loss = loss_of_images(reconstruction, self._generator_loss, self.piece)
            else:
                loss = self._generator_loss(reconstruction, slice(None))
        weight = torch.full_like(loss, self.weight)
        if options.adaptive is not None:
            weight = weight * adaptive_weight(reconstruction_loss, loss, last_layer, options.adaptive)
        return {"adversarial": loss, "adversarial_weight": weight}

    @property
    def balances(self) -> bool:
        """Whether the coming step compares the gradients of two losses at the decoder's last layer."""
        return self.weight > 0 and self.options.adaptive is not None

    def sample_views(self, samples: Sequence[int], size: tuple[int, int]) -> dict[str, View]:
        """The views of a micro-batch on the CPU; none before `discriminator.start`. See `sample_views`."""
        return sample_views(self.module, self.seed, self.step, samples, size) if self.weight else {}

    def _generator_loss(self, images: Tensor, part: slice) -> Tensor:
        """The loss of some of the reconstructions, `part` of the batch."""
        noise, crop = self.views["generator"]
        options = self.options
        # through the module, not the engine: this backward pass must not reach the discriminator
        return generator_loss(
            self.module,
            images,
            View(noise._replace(amounts=noise.amounts[:, part]), crop),
            self.blur,
            options.augment,
            options.cutout,
            options.generator,
        )

    def discriminator_step(self, pixels: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """One backward pass of the discriminator, and an update at the end of an accumulation.

        Args:
            pixels: (B or more, 3, H, W) originals; reconstruction: (B, 3, H, W) of the first B.
        """
        names = ["discriminator", "consistency", "accuracy_real", "accuracy_fake"]
        names += ["lecam"] if self.lecam else []
        if not self.weight:
            return {name: reconstruction.new_zeros(()) for name in names}
        options = self.options
        loss = discriminator_loss(
            partial(deepspeed_engine.forward, self.engine),
            pixels[: len(reconstruction)],
            reconstruction,
            self.views,
            options.loss,
            options.consistency,
            self.blur,
            options.augment,
            options.cutout,
            self.lecam,
            options.lecam,
        )
        self.engine.backward(loss.total)
        norm = deepspeed_engine.optimizer_step(self.engine)
        self.grad_norm = 0.0 if norm is None else norm
        return dict(zip(names, loss[1:]))

    def state_dict(self) -> dict[str, float]:
        """What the engine does not hold: the running means of LeCam."""
        return self.lecam.state_dict() if self.lecam else {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        # a checkpoint of a run without LeCam has none
        if self.lecam and state:
            self.lecam.load_state_dict(state)


def adaptive_weight(
    reconstruction_loss: Tensor, generator_loss: Tensor, last_layer: Tensor, limits: str = "floor"
) -> Tensor:
    """VQGAN's adaptive GAN weight (arXiv 2012.09841, equation 7).

    |d reconstruction_loss| / |d generator_loss|, the gradients taken at `last_layer` and averaged over ranks;
    clamped to `ADAPTIVE_LIMITS[limits]`. It has no gradient; both losses keep their graphs.

    Raises:
        UserError: unknown `limits`.
    """
    if limits not in ADAPTIVE_LIMITS:
        raise UserError(f"discriminator.adaptive is {limits!r}.{did_you_mean(str(limits), ADAPTIVE_LIMITS)}")
    # retain_graph: the same graphs are used by the backward pass
    norms = []
    for loss in (reconstruction_loss, generator_loss):
        (gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
        # the norm of the mean gradient, not the mean of norms: every rank gets the weight of the global batch
        norms.append((distributed.sum_over_ranks(gradient.float()) / distributed.world_size()).norm())
    weight = (norms[0] / (norms[1] + 1e-6)).clamp(*ADAPTIVE_LIMITS[limits])
    return weight.sqrt() if limits == "sqrt" else weight


def sample_views(
    discriminator: Discriminator, seed: int, step: int, samples: Sequence[int], size: tuple[int, int]
) -> dict[str, View]:
    """Augmentation and crop parameters of every discriminator pass of one step, by the names in `VIEWS`.

    Args:
        samples: numbers of the images in the global batch; see `sample_noise`.
        size: (height, width) in pixels.
    """
    return {
        name: View(
            sample_noise(seed, step, name, samples),
            discriminator.sample_crop(*size, seeding.torch_generator(seed, "crop", step, name)),
        )
        for name in VIEWS
    }
