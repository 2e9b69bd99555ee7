"""The tensors of a captured step: a batch of the same shape continues with the step of an earlier one."""

import contextlib

import pytest
import torch

from open_unitok.generation import Sampling, backends, generate_image_codes, image_sampling, iter_image_codes
from open_unitok.generation.backends import captured_step
from open_unitok.generation.backends.captured_step import CapturedStep, KeptSteps, round_up

PROMPTS = [[1, 20, 30, 40, 50, 3], [1, 60, 3], [1, 7, 8, 9, 10, 11, 12, 13, 3]]
OTHERS = [[1, 5, 3], [1, 8, 80, 3], [1, 30, 31, 32, 33, 34, 35, 36, 37, 38, 3]]
UNCONDITIONAL = [1, 90, 91, 3]
SAMPLED = Sampling(guidance=3.0, top_k=12, top_p=0.95)


@pytest.fixture
def steps(monkeypatch):
    """Static steps on the CPU; the function of the first batch stands for its graph. Returns them by key."""
    found = {}

    @contextlib.contextmanager
    def borrow(model, key):
        yield found.setdefault(key, CapturedStep())

    monkeypatch.setattr(captured_step, "capture_step", lambda step, state, device, pool: step)
    monkeypatch.setattr(backends, "borrow_step", borrow)
    monkeypatch.setattr(image_sampling, "choose_backend", lambda model, backend, **options: backend)
    return found


def generate(model, prompts, sampling, seeds, backend="cuda_graph", prefix=None):
    return generate_image_codes(model, prompts, sampling, seeds, UNCONDITIONAL, prefix, backend)


def test_a_later_batch_continues_with_an_earlier_step(model, steps):
    first = generate(model, PROMPTS, SAMPLED, [1, 2, 3])
    kept = first.clone()
    guided_less = Sampling(guidance=1.5, top_k=12, top_p=0.95, guidance_schedule="cosine")
    for prompts, sampling, seeds in [(OTHERS, SAMPLED, [4, 5, 6]), (PROMPTS, guided_less, [1, 2, 3])]:
        found = generate(model, prompts, sampling, seeds)
        assert torch.equal(found, generate(model, prompts, sampling, seeds, "torch"))
    given = generate(model, PROMPTS, SAMPLED, [1, 2, 3], prefix=first[:, :4])
    assert torch.equal(given, kept) and torch.equal(first, kept)  # a result is not overwritten by later ones
    assert len(steps) == 1


@pytest.mark.parametrize(
    "change",
    [{"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.5}, {"greedy": True}, {"guidance": 1.0}],
    ids=lambda change: next(iter(change)),
)
def test_what_a_graph_holds_as_a_constant_is_part_of_the_key(model, steps, change):
    generate(model, PROMPTS, SAMPLED, [1, 2, 3])
    settings = {"guidance": 3.0, "top_k": 12, "top_p": 0.95, **change}
    found = generate(model, PROMPTS, Sampling(**settings), [1, 2, 3])
    assert torch.equal(found, generate(model, PROMPTS, Sampling(**settings), [1, 2, 3], "torch"))
    assert len(steps) == 2


def test_rows_and_lengths_are_part_of_the_key(model, steps, monkeypatch):
    monkeypatch.setattr(captured_step, "CAPACITY_MULTIPLE", 16)
    long = [[1, *range(5, 20), 3]]
    for prompts in (PROMPTS[:1], PROMPTS[:2], long):
        found = generate(model, prompts, SAMPLED, [1, 2, 3][: len(prompts)])
        assert torch.equal(found, generate(model, prompts, SAMPLED, [1, 2, 3][: len(prompts)], "torch"))
    assert len(steps) == 3


def test_a_step_that_was_left_early_can_be_used_again(model, steps):
    stopped = iter_image_codes(model, OTHERS, SAMPLED, [7, 8, 9], UNCONDITIONAL, backend="cuda_graph")
    for _ in range(4):
        next(stopped)
    stopped.close()
    found = generate(model, PROMPTS, SAMPLED, [1, 2, 3])
    assert torch.equal(found, generate(model, PROMPTS, SAMPLED, [1, 2, 3], "torch")) and len(steps) == 1


def test_a_step_holds_no_reference_to_the_model(make_model, steps):
    import weakref

    model = make_model()
    generate(model, PROMPTS, SAMPLED, [1, 2, 3])
    (step,) = steps.values()
    step.replay = None  # here it is a function of the batch; a graph refers to no Python object
    reference = weakref.ref(model)
    del model
    assert reference() is None


def test_steps_are_usable_in_and_out_of_inference_mode(model, steps):
    expected = generate(model, PROMPTS, SAMPLED, [1, 2, 3], "torch")
    with torch.inference_mode():
        assert torch.equal(generate(model, PROMPTS, SAMPLED, [1, 2, 3]), expected)
    assert torch.equal(generate(model, PROMPTS, SAMPLED, [1, 2, 3]), expected) and len(steps) == 1


def test_few_steps_are_kept():
    kept = KeptSteps(weights=())
    for i in range(captured_step.MAX_KEPT + 3):
        kept.steps[i] = CapturedStep()
        kept.steps[i].keep("a", torch.zeros(10))
        kept.evict(max_bytes=1e9)
    assert list(kept.steps) == list(range(3, captured_step.MAX_KEPT + 3))
    kept.evict(max_bytes=100)  # 40 bytes each
    assert list(kept.steps) == [captured_step.MAX_KEPT + 1, captured_step.MAX_KEPT + 2]
    kept.evict(max_bytes=39)
    assert not kept.steps


def test_capacities_are_aligned_for_masks():
    assert [round_up(n) for n in (1, 64, 65, 300)] == [64, 64, 128, 320]
