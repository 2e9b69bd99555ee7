"""The step that CUDA captures: on a CPU its codes, its shapes and that the host never waits; on a GPU all."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from open_unitok.generation import Sampling, generate_image_codes, image_sampling
from open_unitok.generation.backends import cuda_graph
from open_unitok.generation.backends import eager as engine

PROMPTS = [[1, 20, 30, 40, 50, 3], [1, 60, 3], [1, 7, 8, 9, 10, 11, 12, 13, 3]]
FREE = [1, 90, 91, 3]
SAMPLED = Sampling(guidance=3.0, temperature=0.9, top_k=12, top_p=0.95, guidance_schedule="linear")
GREEDY = Sampling(guidance=3.0, greedy=True)
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")


class Watch(TorchDispatchMode):
    """Notes the operators for which a host would wait for its device."""

    def __init__(self):
        super().__init__()
        self.waits, self.calls = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        if func.overloadpacket.__name__ in WAITS:
            self.waits.append(str(func))
        return func(*args, **(kwargs or {}))


class Recorded(cuda_graph.Position):
    """Plays the part of a captured graph: the same step over the same buffers, watched."""

    made = ()

    def capture(self):
        Recorded.made = (*Recorded.made, self)
        self.watch, self.addresses = Watch(), []

    def run(self, noise):
        with self.watch:
            super().run(noise)
        tensors = [self.codes, self.drawn, self.slot, self.places, *self.embedder_buffers()]
        tensors += [t for layer in self.engine.decoder.cache.layers for t in (layer.keys, layer.values)]
        self.addresses.append([t.data_ptr() for t in tensors])

    def embedder_buffers(self):
        return [] if self.embedder_cache is None else self.embedder_cache.buffers


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(engine, "native_can", lambda model: False)
    monkeypatch.setattr(image_sampling, "can_fix", lambda engine, left: True)
    monkeypatch.setattr(image_sampling, "Position", Recorded)
    monkeypatch.setattr(Recorded, "made", ())


@pytest.mark.parametrize(
    "sampling", [SAMPLED, GREEDY, Sampling(guidance=1.0)], ids=["sampled", "greedy", "plain"]
)
@pytest.mark.parametrize("given", [0, 4])
def test_the_fixed_step_draws_the_same_and_nobody_waits(model, sampling, given, recorded):
    seeds = [1, 2, 3]
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(image_sampling, "can_fix", lambda engine, left: False)
        expected = generate_image_codes(model, PROMPTS, sampling, seeds, FREE)
    prefix = expected[:, :given] if given else None
    assert torch.equal(generate_image_codes(model, PROMPTS, sampling, seeds, FREE, prefix), expected)
    (position,) = Recorded.made
    assert len(position.addresses) == 8 - given and position.watch.calls > 100
    assert all(addresses == position.addresses[0] for addresses in position.addresses)
    assert not position.watch.waits


def test_the_fixed_step_knows_attention_that_adds_its_mask(make_model, recorded):
    eager = make_model()
    eager.language_model.set_attn_implementation("eager")
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(image_sampling, "can_fix", lambda engine, left: False)
        expected = generate_image_codes(eager, PROMPTS, SAMPLED, [1, 2, 3], FREE)
    assert torch.equal(generate_image_codes(eager, PROMPTS, SAMPLED, [1, 2, 3], FREE), expected)
    assert len(Recorded.made) == 1 and not Recorded.made[0].watch.waits


def test_a_capture_that_fails_is_logged_and_changes_nothing(full_model, monkeypatch, caplog):
    expected = generate_image_codes(full_model, PROMPTS, SAMPLED, [1, 2, 3], FREE)
    monkeypatch.setattr(engine, "native_can", lambda model: False)
    monkeypatch.setattr(image_sampling, "can_fix", lambda engine, left: True)

    def refuse():
        raise RuntimeError("no stream here\nand more")

    monkeypatch.setattr(torch.cuda, "Stream", refuse)
    assert torch.equal(generate_image_codes(full_model, PROMPTS, SAMPLED, [1, 2, 3], FREE), expected)
    assert "without a CUDA graph: no stream here" in caplog.text and "more" not in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
def test_a_captured_position_draws_what_torch_draws(make_model, sampling, monkeypatch, caplog):
    model = make_model().cuda()
    found = generate_image_codes(model, PROMPTS, sampling, [1, 2, 3], FREE)
    assert "without a CUDA graph" not in caplog.text
    monkeypatch.setattr(image_sampling, "can_fix", lambda engine, left: False)
    assert torch.equal(found, generate_image_codes(model, PROMPTS, sampling, [1, 2, 3], FREE))
