"""Random numbers keyed by (seed, step, ...): independent of earlier ones, so a resumed run repeats them."""

import hashlib
import random
from collections.abc import Sequence

import torch

from open_unitok.core.distributed import rank


def derive_seed(seed: int, *parts: int | str) -> int:
    """A 63-bit seed that depends on every part, stable across processes and Python versions."""
    # not hash(): Python salts the hashes of strings in each process
    text = repr((seed, *parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def torch_generator(seed: int, *parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator for the given parts, the same on every rank."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *parts))


def uniform_per_sample(
    shape: Sequence[int], samples: Sequence[int], seed: int, *parts: int | str
) -> torch.Tensor:
    """Uniform numbers in [0, 1), (*shape, B); those of a sample depend only on its number.

    Args:
        samples: numbers of the B samples in the global batch, so that any split over ranks samples the same.
    """
    return torch.stack(
        [torch.rand(*shape, generator=torch_generator(seed, *parts, n)) for n in samples], dim=-1
    )


def python_random(seed: int, *parts: int | str) -> random.Random:
    """A Python generator for the given parts."""
    return random.Random(derive_seed(seed, *parts))


def seed_forward_pass(seed: int, step: int, micro: int = 0) -> None:
    """Seed torch's global generators for one forward pass of this rank (dropout of adapters)."""
    torch.manual_seed(derive_seed(seed, "step", step, micro, rank()))
