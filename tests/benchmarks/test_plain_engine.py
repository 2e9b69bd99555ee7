"""The plain loop that benchmarks/gpu.py trains by without DeepSpeed gives DeepSpeed's losses and weights."""

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

from open_unitok.training.core import deepspeed_engine
from open_unitok.training.core.options import EngineOptions, Optimizer


@pytest.fixture
def plain(monkeypatch):
    """gpu_parts/plain_engine.py."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("gpu_parts.plain_engine")


def train(options, steps=6):
    """Losses and weights after some micro-batches of a small network."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 1))
    optimizer = Optimizer(lr=1e-2, clip_grad=0.1)
    groups = deepspeed_engine.parameter_groups(model, 0.1)
    engine = deepspeed_engine.build_engine(model, groups, optimizer, options, 4)
    losses = []
    for _ in range(steps):
        # the same inputs for both engines
        loss = engine(torch.randn(4, 8)).float().square().mean()
        engine.backward(loss)
        deepspeed_engine.optimizer_step(engine)
        losses.append(loss.item())
    return losses, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("dtype, accumulation", [("fp32", 1), ("fp32", 2), ("bf16", 1)])
def test_the_plain_loop_trains_as_deepspeed(plain, monkeypatch, dtype, accumulation):
    options = EngineOptions(dtype=dtype, accumulation=accumulation, threads=1)
    deepspeed_engine.init_distributed(options, 0)
    losses, weights = train(options)
    monkeypatch.setattr(deepspeed_engine, "build_engine", plain.PlainEngine)
    found, found_weights = train(options)
    assert found == pytest.approx(losses, rel=1e-6) and losses[-1] != losses[0]
    for a, b in zip(found_weights, weights):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_it_takes_deepspeeds_place_only_where_that_is_missing(plain, monkeypatch):
    report = type("Report", (), {"device": "cpu"})
    for name in ("build_engine", "init_distributed", "shard_to_device"):
        monkeypatch.setattr(deepspeed_engine, name, getattr(deepspeed_engine, name))  # restored afterwards
    original = deepspeed_engine.build_engine
    assert plain.use_plain_engine(report) == "DeepSpeed" and deepspeed_engine.build_engine is original
    monkeypatch.setattr(plain.importlib.util, "find_spec", lambda name: None)
    assert plain.use_plain_engine(report) == "plain loop instead of DeepSpeed"
    assert deepspeed_engine.build_engine is plain.PlainEngine
    assert deepspeed_engine.init_distributed(EngineOptions(), 0) == torch.device("cpu")
