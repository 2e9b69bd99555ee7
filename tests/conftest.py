"""For all tests: the golden folder, and the formula that fills a model of any size with fixed weights."""

import math
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

MASK = 2**64 - 1
MOST_SKIPPED = 60  # tests of a run on one machine that may be skipped


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run that skips most of its tests has failed, although none of them did."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped, passed = (len(reporter.stats.get(key, ())) if reporter else 0 for key in ("skipped", "passed"))
    if skipped > max(MOST_SKIPPED, passed):
        print(f"\n{skipped} tests were skipped, and {passed} passed: see the reasons by -rs")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def golden() -> Path:
    """tests/golden."""
    return Path(__file__).parent / "golden"


def _mix(value: np.ndarray) -> np.ndarray:
    """splitmix64 of uint64 numbers."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def unit(name: str, count: int, seed: int) -> np.ndarray:
    """`count` float64 numbers of mean 0 and variance 1 that depend on name and seed alone."""
    with np.errstate(over="ignore"):
        key = _mix(np.array([(seed << 32 | zlib.crc32(name.encode())) & MASK], dtype=np.uint64))
        bits = _mix(key + np.arange(count, dtype=np.uint64)) >> np.uint64(40)
    return (2 * (bits.astype(np.float64) / 2**24) - 1) * math.sqrt(3)


def _scale(name: str, shape: tuple[int, ...], x: np.ndarray) -> np.ndarray:
    """What the golden files make of the unit numbers, by the tensor's published name."""
    last = name.rpartition(".")[2]
    fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
    if last == "zero_k_bias":
        return 0 * x
    if last == "vocab_usage":
        return abs(x) / abs(x).sum()
    if name.startswith("lpips."):
        if ".lins." in name:
            return 0.5 * abs(x)
        return 0.1 * x if len(shape) == 1 else x * math.sqrt(2 / fan_in)
    if last == "logit_scale":
        return math.log(1 / 0.07) + 0.1 * x
    if len(shape) == 1:
        return 1 + 0.2 * x if last in ("weight", "gamma") else 0.1 * x
    if last in ("pos_embed", "reg_token", "positional_embedding", "cls_token", "mask_token"):
        return 0.3 * x
    if "codebook" in name or "token_embedding" in name or "embed_tokens" in name:
        return x
    doubled = ("qkv", "in_proj_weight", "w0", "q_proj", "k_proj", "lm_head", "linear_head")
    factor = 2 if any(part in name for part in doubled) and not name.startswith("dino.") else 1
    return factor * x / math.sqrt(fan_in)


@pytest.fixture(scope="session")
def formula() -> Callable[..., torch.Tensor]:
    """formula(name, shape, seed) -> the golden files' float32 tensor of that published name."""

    def make(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
        values = _scale(name, tuple(shape), unit(name, math.prod(shape), seed))
        return torch.from_numpy(values.astype(np.float32)).reshape(shape)

    return make
