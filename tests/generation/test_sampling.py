"""Sampling: filter against golden vectors and transformers' warpers, seeded noise, checks of settings."""

import re

import pytest
import torch
from safetensors.torch import load_file

from open_unitok.core.errors import UserError
from open_unitok.generation import Sampling, filter_logits
from open_unitok.generation.sampling import GumbelNoise, apply_guidance, sample_code


def test_filter_equals_the_golden_vectors(golden):
    vectors = load_file(golden / "mllm" / "tiny.outputs.safetensors")
    logits, found = vectors["filter.logits"], 0
    for name, expected in vectors.items():
        match = re.fullmatch(r"filter\.topk(\d+)_topp([\d.]+?)(\.probs_tau0\.9)?", name)
        if not match:
            continue
        found += 1
        k, p = int(match[1]), float(match[2])
        if match[3]:
            torch.testing.assert_close(
                filter_logits(logits / 0.9, k, p).softmax(-1), expected, rtol=0, atol=1e-6
            )
        else:
            assert torch.equal(filter_logits(logits, k, p), expected), name
    assert found == 12


@pytest.mark.parametrize(
    ("k", "p"), [(0, 1.0), (1, 1.0), (7, 1.0), (999, 1.0), (0, 0.01), (0, 0.6), (20, 0.9)]
)
def test_filter_equals_the_warpers_of_transformers(k, p):
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(3)) * 3
    expected = logits
    if k:
        expected = TopKLogitsWarper(k)(None, expected)
    if p < 1:
        expected = TopPLogitsWarper(p)(None, expected)
    assert torch.equal(filter_logits(logits, k, p), expected)


def test_ties_with_the_last_of_top_k_are_kept():
    logits = torch.tensor([3.0, 1.0, 1.0, 0.0])
    assert filter_logits(logits, top_k=2).isfinite().tolist() == [True, True, True, False]


def test_guidance_formula():
    logits = torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    assert apply_guidance(logits, 3.0).tolist() == [[4.0, 1.0]]
    assert apply_guidance(logits, 1.0).tolist() == [[2.0, 1.0]]


def test_noise_depends_only_on_the_seed_of_the_image():
    together = [GumbelNoise([5, 6, 5], 3, 11)]
    alone = [GumbelNoise([6], 3, 11)]
    for _ in range(3):
        noise, single = together[0].sample(), alone[0].sample()
        assert noise.shape == (3, 3, 11) and noise.isfinite().all()
        assert torch.equal(noise[:, 1], single[:, 0])
        assert torch.equal(noise[:, 0], noise[:, 2]) and not torch.equal(noise[:, 0], noise[:, 1])


def test_sampled_codes_follow_the_probabilities():
    logits = torch.tensor([0.7, 0.2, 0.1]).log().expand(4000, -1)
    noise = GumbelNoise(list(range(4000)), 1, 3).sample()[0]
    shares = sample_code(logits, Sampling(), noise).bincount(minlength=3) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.7, 0.2, 0.1]), rtol=0, atol=0.03)
    assert sample_code(logits, Sampling(top_k=1), noise).unique().tolist() == [0]
    assert sample_code(logits, Sampling(temperature=0.01), noise).unique().tolist() == [0]
    assert sample_code(logits, Sampling(greedy=True), None).unique().tolist() == [0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": float("nan")}, r"temperature is nan; it must be a number > 0"),
        ({"temperature": 0}, "set greedy"),
        ({"guidance": float("inf")}, "guidance is inf"),
        ({"guidance": 0.5}, "1 = no guidance"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 10**400}, "top_k is 1000"),
        ({"guidance": 10**400}, "guidance is 1000"),
        ({"top_k": 2.0}, "whole number"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": "0.9"}, "top_p is '0.9'"),
        ({"greedy": 1}, "True or False"),
        ({"guidance_schedule": "cubic"}, "constant, linear, cosine"),
    ],
)
def test_invalid_settings_are_named(settings, words):
    with pytest.raises(UserError, match=words):
        Sampling(**settings)


@pytest.mark.parametrize("seed", [-1, 1.5, "7", True, None, 2**63])
def test_invalid_seeds_are_rejected(seed):
    with pytest.raises(UserError, match="seed is"):
        GumbelNoise([seed], 1, 2)
