"""Each DeepSpeed internal in `DEEPSPEED_INTERNALS` exists and behaves as the engine uses it."""

import importlib
from collections import Counter
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn

from open_unitok.training.core import deepspeed_engine
from open_unitok.training.core.deepspeed_engine import DEEPSPEED_INTERNALS
from open_unitok.training.core.options import EngineOptions, Optimizer


class TwoGroups(nn.Module):
    """The scale comes first, so that the matrix is in the second parameter group."""

    def __init__(self, scale: torch.Tensor):
        super().__init__()
        self.scale = nn.Parameter(scale)
        self.matrix = nn.Parameter(torch.ones(3, 4))

    def forward(self, x):
        return ((x @ self.matrix).square().mean() * self.scale).sum()


def build(stage: int, accumulation: int = 1, dtype: str = "fp32") -> Any:
    deepspeed_engine.init_distributed(EngineOptions(), 0)
    scale = torch.tensor(2.0)
    if stage == 3:
        scale = scale.view(1)  # DeepSpeed's broadcast fails on 0-d parameters
    module, optimizer = TwoGroups(scale), Optimizer()
    options = EngineOptions(zero_stage=stage, accumulation=accumulation, dtype=dtype)
    groups = deepspeed_engine.parameter_groups(module, 0.1)
    deepspeed_engine.shard_to_device(module, torch.device("cpu"), optimizer, options, 4)
    return deepspeed_engine.build_engine(module, groups, optimizer, options, 4)


def train(engine: Any, steps: int = 1) -> None:
    for _ in range(steps):
        engine.backward(engine(torch.ones(4, 3)))
        deepspeed_engine.optimizer_step(engine)


def test_the_tested_version_is_installed():
    assert deepspeed.__version__.startswith("0.19."), (
        "run these tests against the new version, then change this"
    )


@pytest.mark.parametrize("name", DEEPSPEED_INTERNALS)
def test_each_internal_exists(name):
    root, *attributes = name.split(".")
    if root == "deepspeed":
        found = importlib.import_module(root)
        for depth, attribute in enumerate(attributes):
            if not hasattr(found, attribute):
                found = importlib.import_module(".".join([root, *attributes[: depth + 1]]))
            else:
                found = getattr(found, attribute)
        return
    engine = build(3 if root == "parameter" else 1)
    holder = {"engine": engine, "zero": engine.optimizer, "parameter": engine.module.matrix}[root]
    assert hasattr(holder, attributes[0]), f"DeepSpeed {deepspeed.__version__} has no {name}"


def test_the_shared_memory_operator_is_not_built():
    deepspeed_engine.init_distributed(EngineOptions(), 0)
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False


def test_the_first_broadcast_goes_through_broadcast_model(monkeypatch):
    shapes = []
    original = deepspeed.DeepSpeedEngine._broadcast_model

    def spy(self):
        shapes.append(self.module.scale.shape)
        return original(self)

    monkeypatch.setattr(deepspeed.DeepSpeedEngine, "_broadcast_model", spy)
    engine = build(0)
    assert shapes == [(1,)] and engine.module.scale.shape == ()
    assert deepspeed.DeepSpeedEngine._broadcast_model is spy


def test_one_rank_reduces_no_gradients(monkeypatch):
    calls = Counter()
    for name in ("all_reduce", "all_reduce_coalesced"):
        original = getattr(deepspeed.comm, name)
        monkeypatch.setattr(
            deepspeed.comm, name, lambda *a, o=original, n=name, **k: (calls.update([n]), o(*a, **k))[1]
        )
    engine = build(0)
    calls.clear()
    engine.backward(engine(torch.ones(4, 3)))
    assert not calls
    engine.enable_backward_allreduce = True  # the switch makes the difference
    engine.backward(engine(torch.ones(4, 3)))
    assert calls


def test_accumulation_boundary_and_gradient_norm():
    assert not build(0).zero_optimization()
    engine = build(1, accumulation=2)
    assert engine.zero_optimization()
    boundaries = []
    for _ in range(4):
        engine.backward(engine(torch.ones(4, 3)))
        boundaries.append(engine.is_gradient_accumulation_boundary())
        engine.step()
    assert boundaries == [False, True, False, True]
    assert float(engine.get_global_grad_norm()) > 0


def test_autocast_is_reported():
    assert not build(0).torch_autocast_enabled()
    engine = build(0, dtype="bf16")
    assert engine.torch_autocast_enabled() and engine.torch_autocast_dtype() == torch.bfloat16


def test_moments_of_later_groups_need_the_second_link():
    """`overwrite_rows` links a second time: DeepSpeed misses the moments of the second group."""
    from deepspeed.utils import safe_get_full_optimizer_state

    engine = build(1)
    train(engine, steps=2)
    zero = engine.optimizer
    assert zero.optimizer.state
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()
    assert zero._hp_optimizer_states_linked
    moment = safe_get_full_optimizer_state(engine.module.matrix, "exp_avg")
    assert moment is not None and moment.shape == (3, 4) and moment.any()


def test_zero_3_marks_parameters_and_gathers_whole_weights():
    assert not hasattr(build(2).module.matrix, "ds_id")
    engine = build(3)
    assert engine.module.matrix.numel() == 0
    whole = deepspeed_engine.gather_zero3_weights(engine)
    assert whole["matrix"].shape == (3, 4) and (whole["matrix"] == 1).all()


def test_clear_backward_seen_flag_allows_a_gradient_first():
    engine = build(2)
    for _ in range(2):
        loss = deepspeed_engine.forward(engine, torch.ones(4, 3))
        (gradient,) = torch.autograd.grad(loss, engine.module.matrix, retain_graph=True)
        assert gradient.any()
        engine.backward(loss)
        deepspeed_engine.optimizer_step(engine)
