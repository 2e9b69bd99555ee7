"""DeepSpeed on one CPU process: no output, and equal to plain torch at ZeRO 0 to 2."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from open_unitok.core.errors import UserError
from open_unitok.training.core import deepspeed_engine
from open_unitok.training.core.options import EngineOptions, Optimizer
from open_unitok.training.data import seeding

OPTIMIZER = Optimizer(lr=1e-2, weight_decay=0.1, clip_grad=0.5)


class Net(nn.Module):
    """A matrix, a table of rows, a vector and a scalar: every kind that the engine handles differently."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.tensor(2.0))  # so that the table is in the second group
        self.layer = nn.Linear(6, 5)
        self.table = nn.Parameter(torch.randn(2, 3, 4))

    def forward(self, x):
        return (self.layer(x).square().mean() + self.table.square().sum() * x.mean()) * self.scale


@pytest.fixture(scope="module", autouse=True)
def process():
    deepspeed_engine.init_distributed(EngineOptions(), 0)
    yield
    deepspeed_engine.exit_process()


def build(stage=0, accumulation=1, dtype="fp32"):
    options = EngineOptions(zero_stage=stage, accumulation=accumulation, dtype=dtype)
    net = Net()
    return deepspeed_engine.build_engine(
        net, deepspeed_engine.parameter_groups(net, OPTIMIZER.weight_decay), OPTIMIZER, options, 4
    ), net


def inputs(step, part=0):
    return torch.randn(4, 6, generator=seeding.torch_generator(0, "x", step, part))


def plain(steps, accumulation=1):
    """The same training in plain torch: (losses, gradient norms, net)."""
    net = Net()
    adam = torch.optim.AdamW(
        deepspeed_engine.parameter_groups(net, 0.1), lr=1e-2, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps
    )
    losses, norms = [], []
    for step in range(steps):
        for part in range(accumulation):
            loss = net(inputs(step, part)) / accumulation
            loss.backward()
            losses.append(loss.item() * accumulation)
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5).item())
        adam.step()
        adam.zero_grad()
    return losses, norms, net


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_every_zero_stage_equals_plain_torch(stage, accumulation, capfd):
    trained, net = build(stage, accumulation)
    losses, norms = [], []
    for step in range(4):
        for part in range(accumulation):
            loss = trained(inputs(step, part))
            trained.backward(loss)
            norm = deepspeed_engine.optimizer_step(trained)
            losses.append(loss.item())
            assert (norm is None) == (part < accumulation - 1)
        assert norm is not None
        norms.append(float(norm))
    want_losses, want_norms, want = plain(4, accumulation)
    assert losses == pytest.approx(want_losses, rel=1e-5)
    assert norms == pytest.approx(want_norms, rel=1e-5)
    for name, value in net.named_parameters():
        torch.testing.assert_close(value, want.get_parameter(name), msg=lambda m, name=name: f"{name}: {m}")
    out = capfd.readouterr()
    assert out.out + out.err == ""


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_autograd_grad_before_the_backward_pass(stage, accumulation):
    """As the adaptive GAN weight does; the update is the same as without it."""
    trained, net = build(stage, accumulation)
    for step in range(3):
        for part in range(accumulation):
            loss = deepspeed_engine.forward(trained, inputs(step, part))
            (gradient,) = torch.autograd.grad(loss, net.table, retain_graph=True)
            assert gradient.abs().sum() > 0
            trained.backward(loss)
            deepspeed_engine.optimizer_step(trained)
    _, _, want = plain(3, accumulation)
    for name, value in net.named_parameters():
        torch.testing.assert_close(value, want.get_parameter(name), msg=lambda m, name=name: f"{name}: {m}")


def test_learning_rate_follows_the_multiplier():
    trained, net = build()
    deepspeed_engine.set_lr_multiplier(trained, 0.0)
    before = copy.deepcopy(net.state_dict())
    trained.backward(trained(inputs(0)))
    deepspeed_engine.optimizer_step(trained)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_rows_and_scalars_can_be_overwritten(stage):
    """Written values survive a step of rate 0, so they are in the fp32 master weights; moments start at 0."""
    trained, net = build(stage)
    for step in range(2):
        trained.backward(trained(inputs(step)))
        deepspeed_engine.optimizer_step(trained)
    rows = torch.tensor([[False, True, False], [True, False, False]])
    values = torch.arange(8.0).view(2, 4)
    deepspeed_engine.overwrite_rows(trained, net.table, rows, values)
    deepspeed_engine.clamp_parameter(trained, net.scale, 0.0, 0.75)
    kept = net.table.detach().clone()
    assert torch.equal(kept[rows], values)
    deepspeed_engine.set_lr_multiplier(trained, 0.0)
    nothing = torch.zeros(4, 6)  # gives the table no gradient
    trained.backward(trained(nothing))
    deepspeed_engine.optimizer_step(trained)
    assert torch.equal(net.table, kept) and net.scale == 0.75
    deepspeed_engine.set_lr_multiplier(trained, 1.0)
    trained.backward(trained(nothing))
    deepspeed_engine.optimizer_step(trained)
    moved = (net.table / kept - (1 - 1e-2 * 0.1)).abs()
    assert moved[rows][values != 0].max() < 1e-5 < moved[~rows].max()  # the others move by momentum


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (2, "fp32"), (1, "bf16")])
def test_resume_is_exact(tmp_path, stage, dtype):
    def train(trained, steps):
        losses = []
        for step in steps:
            loss = trained(inputs(step))
            trained.backward(loss)
            deepspeed_engine.optimizer_step(trained)
            losses.append(loss.item())
        return losses

    trained, net = build(stage, dtype=dtype)
    whole = train(trained, range(6))
    started, _ = build(stage, dtype=dtype)
    losses = train(started, range(3))
    started.save_checkpoint(str(tmp_path), tag="model", save_latest=False)
    resumed, other = build(stage, dtype=dtype)
    resumed.load_checkpoint(str(tmp_path), tag="model")
    losses += train(resumed, range(3, 6))
    assert losses == whole
    for name, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_bf16_keeps_fp32_weights():
    trained, net = build(dtype="bf16")
    seen = []
    net.layer.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    trained.backward(trained(inputs(0)))
    deepspeed_engine.optimizer_step(trained)
    assert seen == [torch.bfloat16]
    assert all(p.dtype == torch.float32 for p in net.parameters())


def test_parameter_groups_follow_the_published_rule(numbers):
    groups = deepspeed_engine.parameter_groups(Net(), 0.02, {"layer": 0.5})
    found = {(g["weight_decay"], g["lr_factor"], p.ndim) for g in groups for p in g["params"]}
    assert found == {(0.02, 0.5, 2), (0.0, 0.5, 1), (0.02, 1.0, 3), (0.0, 1.0, 0)}


def test_an_invalid_deepspeed_option_is_one_line():
    options = EngineOptions(deepspeed={"train_batch_size": 7})
    with pytest.raises(UserError, match="DeepSpeed rejects") as error:
        deepspeed_engine.build_engine(
            Net(), deepspeed_engine.parameter_groups(Net(), 0.1), OPTIMIZER, options, 4
        )
    assert "\n" not in str(error.value)


def test_random_numbers_are_keyed():
    assert seeding.derive_seed(0, "a", 1) != seeding.derive_seed(0, "a", 2) != seeding.derive_seed(1, "a", 2)
    assert torch.equal(inputs(3), inputs(3)) and not torch.equal(inputs(3), inputs(4))
    seeding.seed_forward_pass(0, 5)
    one = torch.rand(2)
    torch.rand(9)
    seeding.seed_forward_pass(0, 5)
    assert torch.equal(torch.rand(2), one)


DENORMALS = """
import torch
from open_unitok.training.core import deepspeed_engine
from open_unitok.training.core.options import EngineOptions

device = deepspeed_engine.init_distributed(EngineOptions(threads=2), 0)
assert torch.get_num_threads() == 2
moments = torch.full((8_000_000,), 1e-30, device=device, requires_grad=True)
decayed = moments * 1e-10
decayed.backward(torch.full((8_000_000,), 1e-30))
print(int(decayed.count_nonzero()), int(moments.grad.count_nonzero()))
"""


def test_denormals_are_flushed_in_every_thread():
    """A step on a CPU takes half as long again with them."""
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", DENORMALS], capture_output=True, text=True, env=hidden)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "0"]
