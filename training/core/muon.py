"""Muon (Jordan et al., 2024): hidden matrices are updated by their orthogonalised momentum, all other
parameters by AdamW, at one learning rate (arXiv 2502.16982, section 2.2).

torch.optim.Muon accepts 2-D parameters only, so AdamW would be a second optimiser, which DeepSpeed does not
support; it also orthogonalises one matrix at a time, while this one batches matrices by shape.
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
    """Split each group into parameters that Muon updates ("muon" is true) and those that AdamW updates."""
    hidden = {
        parameter
        for name, parameter in module.named_parameters()
        if parameter.ndim == 2 and not any(word in name for word in NOT_HIDDEN)
    }
    split = []
    for group in groups:
        for muon in (False, True):
            parameters = [p for p in group["params"] if (p in hidden) == muon]
            if parameters:
                split.append({**group, "params": parameters, "muon": muon})
    return split


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
            # Nesterov momentum: m <- 0.95 m + 0.05 g, then the same average of g and the new m
            gradients = [parameter.grad for parameter in parameters]
            torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
            nesterov = torch._foreach_lerp(gradients, momenta, MOMENTUM)
            updates = orthogonalise(torch.stack(nesterov))
            # decoupled weight decay, as in AdamW
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            # an orthogonal (R, C) matrix has entries of RMS 1/sqrt(max(R, C)): scale them to UPDATE_RMS
            rate = -group["lr"] * UPDATE_RMS * math.sqrt(max(rows, columns))
            torch._foreach_add_(parameters, list(updates.unbind()), alpha=rate)


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """(M, R, C) -> (M, R, C): same singular vectors, singular values near 1 (0.7 to 1.2).

    Newton-Schulz iteration in bf16, on the smaller Gram matrix.
    """
    transposed = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if transposed else matrices
    # the Frobenius norm bounds the largest singular value: all are in [0, 1], as the iteration requires
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)).bfloat16()
    a, b, c = COEFFICIENTS
    for _ in range(NEWTON_SCHULZ_STEPS):
        # S = X X^T, X <- a X + (b S + c S^2) X
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if transposed else x).to(matrices.dtype)
