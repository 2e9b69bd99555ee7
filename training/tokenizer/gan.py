"""The discriminator in the training loop: its engine, its clock, its two turns in a step (arXiv 2502.20321,
section 4.1).

B images of this rank that were decoded, H and W their rows and columns.
"""

from collections.abc import Sequence
from functools import partial

import torch

from ..core import deepspeed_engine, schedules
from ..data import seeding
from . import discriminator
from .config import TokenizerRunConfig
from .gan_losses import Look, adaptive_weight, discriminator_loss, draw_looks, generator_loss


class Adversary:
    """Call `begin_step` once a step, then per micro-batch `term` (tokenizer's turn) and `learn` (its own).

    Before its first step both give zeros, so that the rows of the log keep their names.
    """

    def __init__(self, config: TokenizerRunConfig, image_size: int, device: torch.device, micro_batch: int):
        self.options = options = config.discriminator
        self.share = config.losses.adversarial
        self.steps, self.seed = config.steps, config.seed
        torch.manual_seed(seeding.derive_seed(config.seed, "discriminator"))
        self.module = discriminator.build(
            options.kind, options.weights, options.norm, options.spectral_norm, options.width, options.layers
        ).to(device)
        with torch.no_grad():  # images that are too small for it are a mistake to find now
            self.module.eval()(torch.zeros(1, 3, image_size, image_size, device=device))
        groups = deepspeed_engine.parameter_groups(self.module, options.optimizer.weight_decay)
        self.engine = deepspeed_engine.build_engine(
            self.module, groups, options.optimizer, config.engine, micro_batch
        )
        self.module.train()
        self.step, self.weight, self.blur, self.lr = 0, 0.0, 1.0, 0.0
        self.grad_norm: torch.Tensor | float = 0.0
        self._looks: dict[str, Look] = {}

    def begin_step(self, step: int) -> None:
        """Weight, blur and learning rate of the step after `step` steps; its clock begins at `start`."""
        plan, own = self.options, step - self.options.start
        self.step, self.grad_norm = step, 0.0
        self.weight = self.share * schedules.linear_ramp(own, plan.warmup) if own >= 0 else 0.0
        self.blur = 1.0 - schedules.linear_ramp(own, 2 * plan.warmup)
        slope = plan.schedule
        rate = schedules.lr_multiplier(
            slope.kind, max(own, 0), self.steps - plan.start, slope.warmup, slope.start, slope.end
        )
        self.lr = plan.optimizer.lr * rate if self.weight else 0.0
        deepspeed_engine.set_lr_multiplier(self.engine, rate)

    def term(
        self,
        reconstruction: torch.Tensor,
        copies: torch.Tensor,
        last_layer: torch.Tensor,
        samples: Sequence[int],
    ) -> dict[str, torch.Tensor]:
        """The tokenizer's turn: "adversarial", and the factor "adversarial_weight" on it.

        Args:
            reconstruction: the weighted sum of the reconstruction losses, to be balanced against.
            copies: (B, 3, H, W) reconstructions.
            last_layer: the decoder's last weight, whose gradients are compared.
            samples: numbers of the B images in the global batch.
        """
        if not self.weight:
            return {"adversarial": copies.new_zeros(()), "adversarial_weight": copies.new_zeros(())}
        height, width = copies.shape[-2:]
        self._looks = draw_looks(self.module, self.seed, self.step, samples, (height, width))
        options = self.options
        with deepspeed_engine.autocast(self.engine):
            judged = generator_loss(
                self.module, copies, self._looks["generator"], self.blur, options.augment, options.cutout
            )
        weight = torch.full_like(judged, self.weight)
        if options.adaptive is not None:
            weight = weight * adaptive_weight(reconstruction, judged, last_layer, options.adaptive)
        return {"adversarial": judged, "adversarial_weight": weight}

    def learn(self, pixels: torch.Tensor, copies: torch.Tensor) -> dict[str, torch.Tensor]:
        """Its own turn: one backward pass, and an update at the end of an accumulation.

        Args:
            pixels: (B or more, 3, H, W) originals; copies: (B, 3, H, W) their reconstructions.
        """
        names = ("discriminator", "consistency", "accuracy_real", "accuracy_fake")
        if not self.weight:
            return {name: copies.new_zeros(()) for name in names}
        options = self.options
        found = discriminator_loss(
            partial(deepspeed_engine.forward, self.engine),
            pixels[: len(copies)],
            copies,
            self._looks,
            options.loss,
            options.consistency,
            self.blur,
            options.augment,
            options.cutout,
        )
        self.engine.backward(found.total)
        norm = deepspeed_engine.optimizer_step(self.engine)
        self.grad_norm = 0.0 if norm is None else norm
        return dict(zip(names, found[1:]))
