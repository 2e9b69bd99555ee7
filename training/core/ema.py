"""Exponential moving average of the weights, which is then saved as the model."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn


class EMA:
    """Exponential moving average of the trainable parameters, fp32, whole on every rank (ZeRO 0 to 2).

    Args:
        start: until this step the averages are copies.
        pace: steps per update in the rule that lowers the decay at first.
    """

    def __init__(self, module: nn.Module, decay: float, start: int = 0, pace: int = 1):
        self.decay, self.start, self.pace = decay, start, pace
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update after `step` steps; the decay is lower at first, so that initial weights are forgotten."""
        # warm-up of the decay as in TensorFlow's ExponentialMovingAverage
        count = step // self.pace
        decay = min(self.decay, (1 + count) / (10 + count)) if step > self.start else 0.0
        torch._foreach_lerp_(list(self.averages.values()), list(self.parameters.values()), 1 - decay)

    @torch.no_grad()
    def reset_rows(self, parameter: nn.Parameter, rows: torch.Tensor) -> None:
        """Set averages of overwritten rows to the rows themselves."""
        for name, own in self.parameters.items():
            if own is parameter:
                self.averages[name][rows] = own[rows]

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the module has the averaged weights."""
        # swap the storage, so that references to the parameters stay valid
        own = {name: p.data for name, p in self.parameters.items()}
        try:
            for name, parameter in self.parameters.items():
                parameter.data = self.averages[name]
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = own[name]

    def set(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Set the averages by the names of the parameters; other names are ignored."""
        for name, average in self.averages.items():
            average.copy_(saved[name])
