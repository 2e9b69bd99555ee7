"""Muon: hidden matrices move along their orthogonalised momentum (Jordan et al., "Muon", 2024), all other
parameters as AdamW says; one learning rate serves both (arXiv 2502.16982, section 2.2)."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

MOMENTUM = 0.95
UPDATE_RMS = 0.2  # of an update's entries where the learning rate is 1: about AdamW's
NEWTON_SCHULZ_STEPS = 5  # of Newton and Schulz
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Of the two-dimensional weights these are AdamW's: tables of embeddings, and layers that end in logits.
NOT_HIDDEN = ("embed_tokens", "embedding", "lm_head", "depth_head.output")


def muon_groups(module: torch.nn.Module, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups, each cut into what Muon moves ("muon" is true) and what AdamW does."""
    hidden = {
        parameter
        for name, parameter in module.named_parameters()
        if parameter.ndim == 2 and not any(word in name for word in NOT_HIDDEN)
    }
    cut = []
    for group in groups:
        for muon in (False, True):
            parameters = [p for p in group["params"] if (p in hidden) == muon]
            if parameters:
                cut.append({**group, "params": parameters, "muon": muon})
    return cut


class Muon(torch.optim.AdamW):
    """AdamW but for the parameter groups whose "muon" is true: all of their parameters are matrices.

    Args:
        groups: of `muon_groups`; all else is AdamW's.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._move(group)

    def _move(self, group: dict[str, Any]) -> None:
        """One step of a group's matrices; those of one shape are orthogonalised together."""
        alike = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                alike[parameter.shape].append(parameter)
        for (rows, columns), parameters in alike.items():
            momenta = []
            for parameter in parameters:
                state = self.state[parameter]
                if not state:  # AdamW looks for a step in every parameter's state when it is loaded
                    state.update(step=torch.zeros(()), momentum=torch.zeros_like(parameter))
                state["step"] += 1
                momenta.append(state["momentum"])
            gradients = [parameter.grad for parameter in parameters]
            torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
            ahead = torch._foreach_lerp(gradients, momenta, MOMENTUM)  # Nesterov's
            updates = orthogonalise(torch.stack(ahead))
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            rate = -group["lr"] * UPDATE_RMS * math.sqrt(max(rows, columns))
            torch._foreach_add_(parameters, list(updates.unbind()), alpha=rate)


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """(M, R, C) -> (M, R, C): singular vectors kept, singular values brought near 1 (0.7 to 1.2)."""
    turned = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if turned else matrices
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)).bfloat16()
    a, b, c = COEFFICIENTS
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if turned else x).to(matrices.dtype)
