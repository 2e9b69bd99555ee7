"""One linear layer on features, by two recipes.

"lbfgs" is CLIP's (logistic regression, L2 strength swept), "sgd" that of MAE and DINO (batch norm without
parameters, 90 epochs, learning rate swept). Both choose on a tenth of the training images, then fit all of
them. N images, F features, C classes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

STRENGTHS = tuple(10.0**e for e in range(-6, 2))
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
EPOCHS, BATCH, STEPS = 90, 1024, 200
Probe = Callable[[Tensor], Tensor]


class Choice(NamedTuple):
    """A setting of the sweep and its accuracy on the held-out tenth."""

    setting: float
    accuracy: float


def fit(x: Tensor, y: Tensor, classes: int, recipe: str) -> tuple[Probe, dict[str, Any]]:
    """(N, F) features and (N,) labels -> what gives (N, C) scores, and what the sweep chose."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held, rest = order[: max(1, len(x) // 10)], order[max(1, len(x) // 10) :]
    train, name, settings = (
        (by_lbfgs, "L2 strength", STRENGTHS) if recipe == "lbfgs" else (by_sgd, "learning rate", RATES)
    )
    choices = []
    for setting in settings:
        right = train(x[rest], y[rest], classes, setting)(x[held]).argmax(dim=1) == y[held]
        choices.append(Choice(setting, right.float().mean().item()))
    best = max(choices, key=lambda c: c.accuracy)
    about = {name: best.setting, "held-out accuracy": best.accuracy, "swept": [tuple(c) for c in choices]}
    return train(x, y, classes, best.setting), about


def scaling(x: Tensor) -> Probe:
    """Features -> mean 0 and deviation 1 as on the training images."""
    mean, deviation = x.mean(dim=0), x.std(dim=0, correction=0).clamp(min=1e-6)
    return lambda z: (z - mean) / deviation


def by_lbfgs(x: Tensor, y: Tensor, classes: int, strength: float) -> Probe:
    """The minimum of mean cross-entropy + strength / 2 |W|^2; the bias goes free."""
    scale = scaling(x)
    z, weight = scale(x), torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weight, bias], max_iter=STEPS, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(F.linear(z, weight, bias), y) + strength / 2 * weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)  # pyright: ignore[reportArgumentType]
    w, b = weight.detach(), bias.detach()
    return lambda q: F.linear(scale(q), w, b)


def by_sgd(x: Tensor, y: Tensor, classes: int, rate: float) -> Probe:
    """A linear layer behind batch norm without parameters: SGD with momentum, cosine schedule."""
    batch = min(BATCH, len(x))
    norm = torch.nn.BatchNorm1d(x.shape[1], affine=False)
    layer = torch.nn.Linear(x.shape[1], classes)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    steps = EPOCHS * (len(x) // batch)
    optimiser = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    draws = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        for piece in torch.randperm(len(x), generator=draws)[: len(x) // batch * batch].split(batch):
            if len(piece) < 2:  # batch norm has no spread to measure
                continue
            optimiser.zero_grad()
            F.cross_entropy(layer(norm(x[piece])), y[piece]).backward()
            optimiser.step()
            schedule.step()
    norm.eval()
    return torch.no_grad()(lambda q: layer(norm(q)))
