"""Sampling of codes from logits: classifier-free guidance, temperature, top-k, top-p, seeded noise.

Shapes: B images, K sub-codebooks, V entries per sub-codebook.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_unitok.core.errors import UserError
from open_unitok.core.files import SAMPLING_FILE
from open_unitok.tokenizer.folder_checks import loading, read_config

# share of the visual tokens generated so far -> share s of the guidance: scale = 1 + (guidance - 1) * s
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda share: 1.0,
    "linear": lambda share: share,
    "cosine": lambda share: (1 - math.cos(math.pi * share)) / 2,
}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling settings of an image, checked on construction.

    Attributes:
        guidance: classifier-free guidance scale, >= 1; 1 skips the unconditional rows.
        guidance_schedule: "constant"; or "linear" or "cosine", which rise from 1 at the first visual token to
            `guidance` at the last, so that the layout varies more than the details.
        guidance_interval: -1 = guidance at every visual token; n = at tokens 0 to n + 1 alone, LlamaGen's
            `cfg_interval`.
        temperature: > 0, divides the logits after guidance.
        top_k: keep the k most likely entries (and ties with the k-th); 0 keeps all.
        top_p: keep the smallest set of most likely entries whose probability reaches this; 1 keeps all.
        greedy: take the most likely entry; temperature, top_k, top_p and the seed are ignored.

    Raises:
        UserError: a value has the wrong type or is out of range.
    """

    guidance: float = 5.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False
    guidance_schedule: str = "constant"
    guidance_interval: int = -1

    def __post_init__(self):
        _check("guidance", self.guidance, "a number >= 1 (1 = no guidance)", lambda x: x >= 1)
        _check(
            "temperature",
            self.temperature,
            "a number > 0 (for the most likely codes set greedy)",
            lambda x: x > 0,
        )
        _check("top_k", self.top_k, "a whole number >= 0 (0 = all entries)", lambda x: x >= 0, whole=True)
        _check("top_p", self.top_p, "a number in (0, 1] (1 = all entries)", lambda x: 0 < x <= 1)
        _check("guidance_interval", self.guidance_interval, "-1 or more (-1 = every visual token)",
               lambda x: x >= -1, whole=True)  # fmt: skip
        if not isinstance(self.greedy, bool):
            raise UserError(f"greedy is {self.greedy!r}; it must be True or False.")
        if self.guidance_schedule not in SCHEDULES:
            raise UserError(
                f"guidance_schedule is {self.guidance_schedule!r}; it must be one of {', '.join(SCHEDULES)}."
            )

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Sampling":
        """The recommended settings of a model folder (its sampling.json), or the defaults.

        Raises:
            UserError: sampling.json is not valid JSON or has unknown settings.
        """
        path = Path(folder) / SAMPLING_FILE
        if not path.exists():
            return cls()
        with loading(path):
            try:
                return cls(**read_config(folder, SAMPLING_FILE))
            except TypeError as error:
                names = ", ".join(field.name for field in dataclasses.fields(cls))
                raise UserError(f"{path} must be a mapping with some of {names}.") from error

    def override(self, settings: Mapping[str, Any]) -> "Sampling":
        """A copy with some settings replaced; None values and unknown keys are ignored."""
        names = {field.name for field in dataclasses.fields(self)}
        given = {name: value for name, value in settings.items() if name in names and value is not None}
        return dataclasses.replace(self, **given)

    def guidances(self, count: int) -> list[float]:
        """The guidance at each of `count` visual tokens."""
        rise = SCHEDULES[self.guidance_schedule]
        scales = [1 + (self.guidance - 1) * rise(t / max(count - 1, 1)) for t in range(count)]
        if self.guidance_interval < 0:
            return scales
        # the first token is guided in any case, and token t is sampled by decode step t - 1
        guided = min(self.guidance_interval + 2, count)
        return scales[:guided] + [1.0] * (count - guided)


def _check(name: str, value: Any, allowed: str, ok: Any, whole: bool = False) -> None:
    """Raise UserError unless `value` is a finite number (not a bool) for which `ok` holds."""
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    # a comparison, because float(value) overflows for very large ints; it also rejects NaN and infinity
    if not number or not abs(value) <= sys.float_info.max or not ok(value):
        raise UserError(f"{name} is {value!r}; it must be {allowed}.")


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits (..., V) with -inf for entries dropped by top-k, then top-p; the most likely entry is kept.

    A top_k above V keeps all; ties with the k-th entry and the entry that crosses top_p are kept. Equals the
    published UniTok sampler and transformers' TopK and TopP warpers.
    """
    if 0 < top_k < logits.shape[-1]:
        lowest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < lowest, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        # compare the sum before an entry: the entry that crosses the threshold is kept
        beyond = ordered.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1) > top_p
        beyond[..., 0] = False  # roll moved the total, 1, to the front
        # back to the order of the codebook
        dropped = torch.empty_like(beyond).scatter_(-1, order, beyond)
        logits = logits.masked_fill(dropped, -math.inf)
    return logits


def apply_guidance(logits: Tensor, guidance: float | Tensor) -> Tensor:
    """Classifier-free guidance: logits (2B, V), conditional rows first -> (B, V)."""
    conditional, unconditional = logits.chunk(2)
    # l = l_u + s (l_c - l_u)
    return unconditional + guidance * (conditional - unconditional)


class GumbelNoise:
    """Gumbel noise from one generator per image, so that an image's codes depend only on its own seed."""

    def __init__(
        self, seeds: Sequence[int], num_codebooks: int, codebook_size: int, device: torch.device | str = "cpu"
    ):
        self.generators = [torch.Generator(device).manual_seed(check_seed(seed)) for seed in seeds]
        self.exponential = torch.empty(len(seeds), num_codebooks, codebook_size, device=device)
        self.noise = torch.empty_like(self.exponential)  # separate from the input of log, for its `out`

    def sample(self) -> Tensor:
        """The noise (K, B, V) of the next visual token: argmax(logits + noise) samples from softmax(logits).

        Every call fills and returns the same tensor, which a CUDA graph reads. One launch per image: a call
        for several images or visual tokens would give other numbers.
        """
        for row, generator in zip(self.exponential, self.generators):
            row.exponential_(generator=generator)
        return torch.log(self.exponential, out=self.noise).neg_().transpose(0, 1)  # -log(E) is Gumbel


def check_seed(seed: Any) -> int:
    """
    Raises:
        UserError: not a whole number that a torch generator takes.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise UserError(f"seed is {seed!r}; it must be a whole number from 0 to 2**63 - 1.")
    return seed


def sample_code(logits: Tensor, sampling: Sampling, noise: Tensor | None) -> Tensor:
    """Codes (B,) int64 from guided logits (B, V); `noise` (B, V) is Gumbel noise, None if greedy."""
    if sampling.greedy or noise is None:
        return logits.argmax(dim=-1)
    # as published: temperature first, so that top-p applies to the tempered distribution
    logits = filter_logits(logits.float() / sampling.temperature, sampling.top_k, sampling.top_p)
    return (logits + noise).argmax(dim=-1)
