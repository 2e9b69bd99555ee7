"""Muon against torch.optim.Muon, and which parameters it updates."""

import copy

import pytest
import torch
from torch import nn

from open_unitok.core import devices, distributed
from open_unitok.core.errors import UserError
from open_unitok.training.core import muon
from open_unitok.training.core.config import build_config
from open_unitok.training.core.muon import Muon, muon_groups, orthogonalise, orthogonalise_all, share_matrices
from open_unitok.training.core.options import RunConfig

RUN = {"stage": "mllm", "out": "runs/x", "steps": 1, "batch_size": 1, "optimizer": {"kind": "muon"}}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(9, 5)
        self.wide, self.high, self.same = nn.Linear(5, 8), nn.Linear(8, 5), nn.Linear(5, 8)
        self.lm_head = nn.Linear(5, 9, bias=False)

    def forward(self, ids):
        x = self.embed_tokens(ids)
        return self.lm_head(x + self.high(torch.tanh(self.wide(x)) + self.same(x)))


def train(net, optimizers, steps=4):
    for step in range(steps):
        ids = torch.randint(0, 9, (16,), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(net(ids), (ids + 1) % 9).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return dict(net.named_parameters())


def test_equals_torch_muon_and_torch_adamw():
    settings = {"lr": 0.02, "weight_decay": 0.1}
    net = Net()
    groups = muon_groups(net, [{"params": list(net.parameters())}])
    found = train(net, [Muon(groups, **settings, fused=True)])
    net = Net()
    hidden = [net.wide.weight, net.high.weight, net.same.weight]
    rest = [p for p in net.parameters() if not any(p is h for h in hidden)]
    muon = torch.optim.Muon(hidden, **settings, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    want = train(net, [muon, torch.optim.AdamW(rest, **settings, fused=True)])
    start = dict(Net().named_parameters())
    for name, value in want.items():  # bf16 inside: the order of rounding differs
        moved = value - start[name]
        assert (found[name] - value).norm() < 0.05 * moved.norm(), name


def test_singular_values_are_near_one():
    matrices = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0))
    for found in (orthogonalise(matrices), orthogonalise(matrices.mT)):
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.6 and values.max() < 1.3
    assert torch.equal(orthogonalise(matrices.mT), orthogonalise(matrices).mT)


def test_resume_is_exact():
    def optimizer(net):
        return Muon(muon_groups(net, [{"params": list(net.parameters())}]), lr=0.02)

    original = Net()
    first = optimizer(original)
    train(original, [first], steps=4)
    resumed = Net()
    resumed.load_state_dict(original.state_dict())
    second = optimizer(resumed)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    want = train(original, [first], steps=3)
    found = train(resumed, [second], steps=3)
    assert all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize("limit", ["AVX2", "avx512_core", None])
def test_products_are_bf16_where_the_processor_is_faster_in_it(monkeypatch, limit):
    """oneDNN's limit of instructions makes a processor one without bf16 products."""
    if limit:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    else:
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    muon.product_dtype.cache_clear()
    expected = torch.bfloat16 if devices.fast_bf16() else torch.float32
    assert expected == torch.float32 or limit is None
    assert muon.product_dtype(torch.device("cpu")) == expected
    muon.product_dtype.cache_clear()


def test_ranks_share_the_matrices(monkeypatch):
    """Each rank orthogonalises about half of the work and receives the rest."""
    shapes = [(5, 8)] * 3 + [(8, 5)] + [(8, 8)] * 4
    matrices = [
        torch.randn(shape, generator=torch.Generator().manual_seed(n)) for n, shape in enumerate(shapes)
    ]
    batches = [matrices[:3], matrices[3:4], matrices[4:]]
    want = orthogonalise_all(batches)
    sent, calls = {}, []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(muon, "orthogonalise", lambda x: calls.append(len(x)) or orthogonalise(x))

    def found_on(rank):
        def broadcast(buffer, source):
            if source == rank:
                sent[source] = buffer.clone()
            elif source in sent:
                buffer.copy_(sent[source])

        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(muon.dist, "broadcast", broadcast)
        calls.clear()
        return orthogonalise_all(batches), sum(calls)

    found_on(0)
    for rank in (1, 0):
        found, own = found_on(rank)
        assert 0 < own < len(matrices)
        for ours, theirs in zip(found, want, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert sorted(share_matrices([(4, torch.Size((8, 8)))], 2)) == [0, 0, 1, 1]


def test_zero_stages_are_rejected():
    assert build_config(RunConfig, RUN).optimizer.kind == "muon"
    with pytest.raises(UserError, match="Muon needs whole matrices"):
        build_config(RunConfig, {**RUN, "engine": {"zero_stage": 1}})
