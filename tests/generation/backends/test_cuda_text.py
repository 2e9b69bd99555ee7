"""Captured text steps, run one by one on a CPU: the ids of eager decoding, whatever group and rows."""

import contextlib
import types

import pytest
import torch

from open_unitok.generation import generate_text_ids, iter_text_ids, text_generation
from open_unitok.generation.backends import captured_step, cuda_text
from open_unitok.generation.backends.captured_step import CapturedStep
from open_unitok.generation.backends.text_samplers import GreedySampler, TransformersSampler, sampler_of

SAMPLED = {"do_sample": True, "temperature": 1.3, "top_k": 40, "top_p": 0.9}


@pytest.fixture(scope="module")
def asked(full_model):
    """Prompts of different lengths with 0, 1 or 2 images, two of them about the same one."""
    mark, count = full_model.config.image_token_id, full_model.config.num_image_tokens
    image = [mark] * count
    generator = torch.Generator().manual_seed(0)
    codes = [torch.randint(16, (n, count, 3), generator=generator) for n in (1, 0, 2)]
    prompts = [[1, 5, *image, 6, 7], [1, 8, 9], [1, *image, 10, *image, 11], [1, 5, *image, 12, 13, 14]]
    return [*prompts, [1, 5, *image, 6]], [*codes, codes[0], codes[0]]


@pytest.fixture
def steps(monkeypatch):
    """Static steps on the CPU; the function of the first batch stands for its graph. Returns them by key."""
    found, replays = {}, []

    @contextlib.contextmanager
    def borrow(model, key):
        yield found.setdefault(key, CapturedStep())

    def capture(step, state, device, pool):
        return lambda: replays.append(1) or step()

    monkeypatch.setattr(captured_step, "capture_step", capture)
    monkeypatch.setattr(cuda_text, "borrow_step", borrow)
    monkeypatch.setattr(text_generation, "choose_backend", lambda model, backend, **options: backend)
    return types.SimpleNamespace(kept=found, replays=replays)


def both(function, *arguments, **options):
    return [function(*arguments, backend=backend, **options) for backend in ("torch", "cuda_graph")]


@pytest.mark.parametrize("options", [{}, {**SAMPLED, "seed": 3}, {"do_sample": True, "seed": 4}])
@pytest.mark.parametrize("share", [True, False])
def test_captured_answers_are_those_of_transformers(full_model, asked, steps, options, share):
    eager, captured = both(generate_text_ids, full_model, *asked, 12, share_prefix=share, **options)
    assert captured == eager and len({tuple(row) for row in eager}) > 2
    assert len(steps.kept) == 1 and len(steps.replays) == 11


@pytest.mark.parametrize("options", [{}, {**SAMPLED, "seed": 3}])
def test_captured_streams_are_those_of_eager_decoding(full_model, asked, steps, options):
    eager, captured = (list(found) for found in both(iter_text_ids, full_model, *asked, 12, **options))
    assert captured == eager and len(eager) == 12


@pytest.mark.parametrize("group", [1, 3, 8, 100])
@pytest.mark.parametrize("place", [0, 1, 4, 7, 8])
def test_an_end_that_is_found_late_is_cut(full_model, asked, steps, monkeypatch, group, place):
    long = generate_text_ids(full_model, *asked, 14, backend="torch")
    ends = {long[row][place] for row in range(len(long))}
    monkeypatch.setattr(full_model.generation_config, "eos_token_id", sorted(ends))
    want = generate_text_ids(full_model, *asked, 14, backend="torch")
    assert max(map(len, want)) <= place
    rows = [[] for _ in want]
    found = cuda_text.iter_captured_text_ids(full_model, *asked, 14, ends, GreedySampler(), group=group)
    for new in found:
        for row, id in zip(rows, new):
            row += [] if id is None else [id]
    assert rows == want
    # no more surplus steps than the rest of a group; none if the prefill already gives the end of all
    longest = max(map(len, want))
    assert len(steps.replays) == (min(-(-longest // group) * group, 13) if longest else 0)


def test_numbers_of_surplus_steps_are_given_back(full_model, asked, steps, monkeypatch):
    """Without a seed the global generator goes on as after eager decoding."""
    torch.manual_seed(0)
    long = generate_text_ids(full_model, *asked, 14, backend="torch", **SAMPLED)
    ends = {row[4] for row in long}
    monkeypatch.setattr(full_model.generation_config, "eos_token_id", sorted(ends))
    states = []
    for backend in ("torch", "cuda_graph"):
        torch.manual_seed(0)
        rows = generate_text_ids(full_model, *asked, 14, backend=backend, **SAMPLED)
        states.append((rows, torch.get_rng_state().tolist()))
    assert states[0] == states[1] and max(map(len, rows)) <= 4


def test_numbers_of_rows_share_a_step(full_model, asked, steps):
    prompts, images = asked
    for count in (3, 4, 5, 1):
        eager, captured = both(generate_text_ids, full_model, prompts[:count], images[:count], 9)
        assert captured == eager
    assert sorted(key[1] for key in steps.kept) == [1, 4, 8]


def test_rows_are_rounded_up():
    assert [cuda_text.round_up_rows(n) for n in (1, 2, 3, 5, 9, 15, 16, 17, 65)] == [
        1, 2, 4, 8, 16, 16, 16, 32, 80,
    ]  # fmt: skip


def test_what_a_graph_holds_as_a_constant_is_part_of_the_key(full_model, asked, steps):
    for change in ({}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.5}, {"do_sample": False}):
        eager, captured = both(generate_text_ids, full_model, *asked, 9, seed=1, **{**SAMPLED, **change})
        assert captured == eager
    assert len(steps.kept) == 5


def test_what_the_captured_step_covers(full_model, monkeypatch):
    assert type(sampler_of(full_model, {"temperature": 0.5, "num_beams": 1})) is GreedySampler
    defaults = sampler_of(full_model, {"do_sample": True})
    assert isinstance(defaults, TransformersSampler) and defaults.key == ("transformers", 1.0, 50, 1.0)
    monkeypatch.setattr(full_model.generation_config, "top_p", 0.7)
    assert sampler_of(full_model, {"do_sample": True, "top_k": None}).key == ("transformers", 1.0, None, 0.7)
    for more in ({"num_beams": 2}, {"repetition_penalty": 1.2}, {"do_sample": True, "min_p": 0.1}):
        assert sampler_of(full_model, more) is None
    # transformers' own loop says what is wrong with these
    for wrong in ({"temperature": -1.0}, {"top_k": 0.5}, {"top_p": "a"}):
        assert sampler_of(full_model, {"do_sample": True, **wrong}) is None


def test_noise_of_a_sampler_is_that_of_multinomial():
    """What makes captured sampling equal to transformers': torch's algorithm for one sample."""
    sampler = TransformersSampler(None, None, None)
    logits = 3 * torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    for seed in range(20):
        torch.manual_seed(seed)
        expected = torch.multinomial(logits.softmax(-1), 1).squeeze(1)
        torch.manual_seed(seed)
        assert torch.equal(sampler(logits), expected)
