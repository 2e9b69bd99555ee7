"""Muon: hidden matrices move along their orthogonalised momentum (Jordan et al., "Muon", 2024), all other
parameters by AdamW; one learning rate serves both (arXiv 2502.16982, section 2.2).

Why not torch.optim.Muon: it takes two-dimensional parameters only, so that AdamW would be a second optimiser
beside it in DeepSpeed, and orthogonalises one matrix at a time. This one batches matrices by shape.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

MOMENTUM = 0.95
UPDATE_RMS = 0.2  # of an update's entries at learning rate 1, about AdamW's
NEWTON_SCHULZ_STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic x -> a x + b x^3 + c x^5 on singular values
# Matrices that AdamW updates: embedding tables, and layers that produce logits.
NOT_HIDDEN = ("embed_tokens", "embedding", "lm_head", "depth_head.output")


def muon_groups(module: torch.nn.Module, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups, each split into what Muon ("muon" is true) and what AdamW updates."""
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
    """Muon for the parameter groups of `muon_groups` whose "muon" is true, AdamW for the others.

    All arguments but the groups are AdamW's.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        # AdamW's step sees its own groups only
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        """One step of a group's matrices; those of one shape are orthogonalised as a batch."""
        by_shape = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape[parameter.shape].append(parameter)
        for (rows, columns), parameters in by_shape.items():
            momenta = []
            for parameter in parameters:
                state = self.state[parameter]
                if not state:  # AdamW.load_state_dict expects "step" in every parameter's state
                    state.update(step=torch.zeros(()), momentum=torch.zeros_like(parameter))
                state["step"] += 1
                momenta.append(state["momentum"])
            gradients = [parameter.grad for parameter in parameters]
            torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
            nesterov = torch._foreach_lerp(gradients, momenta, MOMENTUM)
            updates = orthogonalise(torch.stack(nesterov))
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            # an orthogonal (R, C) matrix has entries of RMS 1/sqrt(max(R, C))
            rate = -group["lr"] * UPDATE_RMS * math.sqrt(max(rows, columns))
            torch._foreach_add_(parameters, list(updates.unbind()), alpha=rate)


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """(M, R, C) -> (M, R, C): same singular vectors, singular values near 1 (0.7 to 1.2).

    Newton-Schulz iteration in bf16, on the smaller Gram matrix.
    """
    transposed = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if transposed else matrices
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)).bfloat16()
    a, b, c = COEFFICIENTS
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if transposed else x).to(matrices.dtype)
