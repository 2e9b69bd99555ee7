"""Random numbers keyed by (seed, step, ...): the same on every resume, whatever was drawn before."""

import hashlib
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from open_unitok.core.distributed import rank

if TYPE_CHECKING:  # the help of commands shall not wait for torch
    import torch


def derive_seed(seed: int, *parts: int | str) -> int:
    """A 63-bit number that depends on every part."""
    text = repr((seed, *parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def torch_generator(seed: int, *parts: int | str, device: "torch.device | str" = "cpu") -> "torch.Generator":
    """A torch generator of its own for the given parts, the same on every rank."""
    import torch

    return torch.Generator(device=device).manual_seed(derive_seed(seed, *parts))


def uniform_per_sample(
    shape: Sequence[int], samples: Sequence[int], seed: int, *parts: int | str
) -> "torch.Tensor":
    """Uniform numbers in [0, 1), (*shape, B): a sample's depend on its number and not on its neighbours.

    Args:
        samples: numbers of the B samples in the global batch, so that any split over ranks draws the same.
    """
    import torch

    return torch.stack(
        [torch.rand(*shape, generator=torch_generator(seed, *parts, n)) for n in samples], dim=-1
    )


def python_random(seed: int, *parts: int | str) -> random.Random:
    """A Python generator of its own for the given parts."""
    return random.Random(derive_seed(seed, *parts))


def seed_forward_pass(seed: int, step: int, micro: int = 0) -> None:
    """Seed torch's global generators (dropout of adapters) for one forward pass of this rank."""
    import torch

    torch.manual_seed(derive_seed(seed, "step", step, micro, rank()))
