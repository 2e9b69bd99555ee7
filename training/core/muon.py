"""Muon (Jordan et al., 2024): hidden matrices are updated by their orthogonalised momentum, all other
parameters by AdamW, at one learning rate (arXiv 2502.16982, section 2.2).

torch.optim.Muon accepts 2-D parameters only, so AdamW would be a second optimiser, which DeepSpeed does not
support; it also orthogonalises one matrix at a time, while this one batches matrices by shape. Several
processes on CPUs share the matrices, since orthogonalising takes as long as a third of a forward pass.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from open_unitok.core import distributed
from open_unitok.core.devices import fast_bf16

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
        directions = []
        for parameters in by_shape.values():
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
            directions.append(torch._foreach_lerp(gradients, momenta, MOMENTUM))
        for ((rows, columns), parameters), updates in zip(by_shape.items(), orthogonalise_all(directions)):
            # decoupled weight decay, as in AdamW
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            # an orthogonal (R, C) matrix has entries of RMS 1/sqrt(max(R, C)): scale them to UPDATE_RMS
            rate = -group["lr"] * UPDATE_RMS * math.sqrt(max(rows, columns))
            torch._foreach_add_(parameters, updates, alpha=rate)


def orthogonalise_all(batches: Sequence[Sequence[torch.Tensor]]) -> list[list[torch.Tensor]]:
    """`orthogonalise` of every matrix, those of one shape in one sequence; on CPUs, of several processes each
    takes a share and receives the others'."""
    flat = [matrix for batch in batches for matrix in batch]
    world = distributed.world_size()
    if world == 1 or not flat or flat[0].is_cuda:
        return [list(orthogonalise(torch.stack(list(batch)))) for batch in batches]
    ranks = share_matrices([(len(batch), batch[0].shape) for batch in batches], world)
    # one buffer per rank, with its matrices in their order
    sizes = [sum(m.numel() for m, owner in zip(flat, ranks) if owner == rank) for rank in range(world)]
    buffers = [torch.empty(size, dtype=product_dtype(flat[0].device)) for size in sizes]
    places, filled = [], [0] * world
    for matrix, owner in zip(flat, ranks):
        start = filled[owner]
        filled[owner] += matrix.numel()
        places.append(buffers[owner][start : filled[owner]].view(matrix.shape))
    numbers = iter(range(len(flat)))
    for batch in batches:
        own = [number for _, number in zip(batch, numbers) if ranks[number] == distributed.rank()]
        if own:
            found = orthogonalise(torch.stack([flat[number] for number in own]))
            torch._foreach_copy_([places[number] for number in own], list(found))
    for rank, buffer in enumerate(buffers):
        dist.broadcast(buffer.view(torch.uint8), rank)  # bytes: gloo has no bfloat16
    updates = iter([place.to(matrix.dtype) for place, matrix in zip(places, flat)])
    return [[next(updates) for _ in batch] for batch in batches]


def share_matrices(batches: Sequence[tuple[int, torch.Size]], world: int) -> list[int]:
    """The rank of each matrix of (number, shape) batches: the costliest first, to the least busy rank."""
    costs = []  # multiplications of an iteration
    for number, shape in batches:
        small, large = sorted(shape)
        costs += [2 * small * small * large + small**3] * number
    busy, ranks = [0] * world, [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        ranks[number] = busy.index(min(busy))
        busy[ranks[number]] += costs[number]
    return ranks


@functools.cache  # the answer is in /proc/cpuinfo
def product_dtype(device: torch.device) -> torch.dtype:
    """bf16, or fp32 on a processor that is slower in bf16: fifty times where bf16 is emulated."""
    return torch.float32 if device.type == "cpu" and not fast_bf16() else torch.bfloat16


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """(M, R, C) -> (M, R, C): same singular vectors, singular values near 1 (0.7 to 1.2).

    Newton-Schulz iteration in `product_dtype` on the smaller Gram matrix.
    """
    transposed = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if transposed else matrices
    # the Frobenius norm bounds the largest singular value: all are in [0, 1], as the iteration requires
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)).to(product_dtype(x.device))
    a, b, c = COEFFICIENTS
    for _ in range(NEWTON_SCHULZ_STEPS):
        # S = X X^T, X <- a X + (b S + c S^2) X
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if transposed else x).to(matrices.dtype)
