"""Checkpoints of other ZeRO stages: weights and moments arrive bit for bit, and training goes on."""

import gc
import itertools
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from open_unitok.core.errors import UserError
from open_unitok.training.core import deepspeed_engine
from open_unitok.training.core.checkpoint import Checkpoints
from open_unitok.training.core.options import EngineOptions, Optimizer
from open_unitok.training.core.saving import reshard

OPTIMIZER = Optimizer(lr=1e-2, weight_decay=0.1, clip_grad=0.5)
STAGES = (0, 1, 2, 3)


class Net(nn.Module):
    """Two groups of odd sizes, a frozen matrix, and a buffer."""

    def __init__(self, width=5, frozen=True, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(7, width)
        self.matrix = nn.Parameter(torch.randn(3, width))
        self.frozen = nn.Parameter(torch.randn(width, 3), requires_grad=not frozen)
        self.register_buffer("steps", torch.zeros(3))

    def forward(self, x):
        self.steps += 1
        return (self.layer(x) @ self.matrix.T @ self.frozen.T).square().mean()


@pytest.fixture(scope="module", autouse=True)
def process():
    deepspeed_engine.init_distributed(EngineOptions(), 0)
    yield
    deepspeed_engine.exit_process()


def build(stage, net=None, **options):
    net = net or Net()
    settings = EngineOptions(zero_stage=stage, **options)
    groups = deepspeed_engine.parameter_groups(net, OPTIMIZER.weight_decay)
    deepspeed_engine.shard_to_device(net, torch.device("cpu"), OPTIMIZER, settings, 4)
    return deepspeed_engine.build_engine(net, groups, OPTIMIZER, settings, 4)


def train(engine, steps):
    """The losses of these steps."""
    losses = []
    for step in steps:
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(step))
        loss = engine(x)
        engine.backward(loss)
        deepspeed_engine.optimizer_step(engine)
        losses.append(loss.item())
    return losses


def save(folder, engine, trained_only=False):
    return Checkpoints(folder, trained_only=trained_only).save(4, lambda path: None, {"net": engine}, {})


@pytest.fixture(scope="module")
def saved(process, tmp_path_factory):
    """stage -> (checkpoint after four steps, losses of the next four)."""
    found = {}
    for stage in STAGES:
        engine = build(stage)
        train(engine, range(4))
        path = save(tmp_path_factory.mktemp(f"zero{stage}"), engine)
        found[stage] = path, train(engine, range(4, 8))
    return found


@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(STAGES, 2)))
def test_another_zero_stage_continues(saved, before, after, tmp_path):
    path, expected = saved[before]
    engine = build(after, Net(seed=1))
    state = Checkpoints(path.parent).restore(path, {"net": engine})
    assert state["step"] == 4 and engine.global_steps == 4 and (engine.module.steps == 4).all()
    assert train(engine, range(4, 8)) == pytest.approx(expected, rel=1e-5)
    again = reshard.SavedEngine(save(tmp_path, engine) / "training_state" / "net")
    assert again.stage == after and again.trained == {"layer.weight", "layer.bias", "matrix"}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_saves_the_same_numbers(saved, stage):
    """Read in odd pieces, they are the same for every stage."""
    one = reshard.SavedEngine(saved[0][0] / "training_state" / "net")
    other = reshard.SavedEngine(saved[stage][0] / "training_state" / "net")
    assert one.shapes == other.shapes and one.ranks == other.ranks == 1
    for name, shape in one.shapes.items():
        assert one.keys(name) == other.keys(name)
        assert one.keys(name) == (set() if name == "frozen" else {"exp_avg", "exp_avg_sq", "step"})
        for key in {"fp32", *one.keys(name)} - {"step"}:
            whole = one.read(name, key, 0, shape.numel())
            pieces = [other.read(name, key, at, at + 2) for at in range(0, shape.numel() + 2, 2)]
            joined = torch.cat(pieces)
            torch.testing.assert_close(joined[: shape.numel()], whole)
            assert not joined[shape.numel() :].any()


@pytest.mark.parametrize(("before", "after"), [(0, 3), (1, 0), (2, 1), (3, 2)])
def test_a_checkpoint_can_be_removed_once_it_is_loaded(saved, before, after, tmp_path):
    """`checkpoint.keep` removes it later in the run: its files are mapped while they are read only."""
    path, expected = saved[before]
    copied = shutil.copytree(path, tmp_path / path.name)
    engine = build(after, Net(seed=1))
    Checkpoints(tmp_path).restore(copied, {"net": engine})
    gc.collect()
    if sys.platform == "linux":
        assert str(copied) not in Path("/proc/self/maps").read_text()
    for file in copied.rglob("*.pt"):
        file.write_bytes(bytes(file.stat().st_size))  # a map that is left would show zeros
    assert train(engine, range(4, 8)) == pytest.approx(expected, rel=1e-5)


def test_offloaded_states_continue(saved):
    path, expected = saved[0]
    engine = build(2, offload="optimizer")
    Checkpoints(path.parent).restore(path, {"net": engine})
    assert train(engine, range(4, 8)) == pytest.approx(expected, rel=1e-5)


def test_before_the_first_step_there_are_no_moments(tmp_path):
    path = save(tmp_path, build(0))
    engine = build(3)
    Checkpoints(tmp_path).restore(path, {"net": engine})
    assert train(engine, range(3)) == pytest.approx(train(build(0), range(3)), rel=1e-5)


def test_frozen_parameters_that_were_left_out_stay(tmp_path):
    engine = build(3)
    train(engine, range(2))
    path = save(tmp_path, engine, trained_only=True)
    other = build(1)
    kept = other.module.frozen.clone()
    Checkpoints(tmp_path, trained_only=True).restore(path, {"net": other})
    assert other.module.frozen.equal(kept)
    assert train(other, range(2, 4)) == pytest.approx(train(engine, range(2, 4)), rel=1e-5)


def damage_names(folder):
    file = folder / "mp_rank_00_model_states.pt"
    state = torch.load(file, weights_only=False)
    del state[reshard.PARAMETER_NAMES]
    torch.save(state, file)


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (lambda: Net(width=6), r"matrix is \(3, 5\), here \(3, 6\)"),
        (lambda: Net(frozen=False), r"trained other parameters \(frozen\): .*init_from"),
        (lambda: nn.Sequential(Net()), "it has no 0.matrix"),
    ],
)
@pytest.mark.parametrize("before", [0, 1, 3])
def test_another_model_is_rejected(saved, before, net, words):
    engine = build(2, net())
    with pytest.raises(UserError, match=words):
        Checkpoints(saved[before][0].parent).restore(saved[before][0], {"net": engine})


def test_missing_files_of_a_rank_are_rejected(saved, tmp_path):
    folder = shutil.copytree(saved[1][0] / "training_state" / "net", tmp_path / "net")
    file = folder / "mp_rank_00_model_states.pt"
    state = torch.load(file, weights_only=False)
    torch.save(state | {"dp_world_size": 2}, file)
    with pytest.raises(UserError, match=r"lacks files of some of its 2 rank\(s\)"):
        reshard.SavedEngine(folder)
    with pytest.raises(UserError, match="holds no state of an engine"):
        reshard.SavedEngine(tmp_path)


def test_an_old_checkpoint_without_names_is_rejected_at_another_stage(saved, tmp_path):
    engine = build(0)
    path = save(tmp_path, engine)
    damage_names(path / "training_state" / "net")
    Checkpoints(tmp_path).restore(path, {"net": build(0)})
    with pytest.raises(UserError, match="did not record the names"):
        Checkpoints(tmp_path).restore(path, {"net": build(1)})
