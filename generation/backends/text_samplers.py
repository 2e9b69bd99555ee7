"""How the next ids of answers are chosen, in parts that a captured step can use.

A sampler gets its random numbers from a tensor that is filled outside of the graph, by the same calls of the
same generator as in eager decoding. Of equal logits, ids are therefore equal; in bf16 on a GPU, kernels for
another number of rows may round logits differently.

R rows of the batch, V vocabulary.
"""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..sampling import Sampling, sample_code
from .native_text import find_option

_DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}  # of transformers' `generate`


class GreedySampler:
    """The most likely id.

    Attributes:
        key: equal for samplers with the same `choose`.
        random: whether `noise` is used.
        generator: of the noise; None = torch's global one.
    """

    key: Hashable = "greedy"
    random = False
    generator: torch.Generator | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits (R, V) -> ids (R,)."""
        noise = torch.empty_like(logits) if self.random else logits
        self.fill(noise)
        return self.choose(logits, noise)

    def fill(self, noise: Tensor) -> None:
        """Fill `noise` (R, V) with new random numbers."""

    def global_state(self, device: torch.device) -> Tensor | None:
        """The state of torch's global generator if the noise comes from it; the host does not wait."""
        if not self.random or self.generator is not None:
            return None
        return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()

    def set_global_state(self, state: Tensor | None, device: torch.device) -> None:
        """Return to a `global_state`, as if no number had been sampled since."""
        if state is not None and device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        elif state is not None:
            torch.set_rng_state(state)

    def choose(self, logits: Tensor, noise: Tensor) -> Tensor:
        """Ids (R,) from logits and noise (R, V), without a wait for the device."""
        return logits.argmax(-1)


class GumbelSampler(GreedySampler):
    """Sampling with temperature, top-k and top-p as for images: argmax of logits plus Gumbel noise."""

    random = True

    def __init__(self, sampling: Sampling, generator: torch.Generator | None):
        self.sampling, self.generator = sampling, generator
        self.key = ("gumbel", sampling)

    def fill(self, noise: Tensor) -> None:
        noise.exponential_(generator=self.generator).log_().neg_()

    def choose(self, logits: Tensor, noise: Tensor) -> Tensor:
        return sample_code(logits, self.sampling, noise)


class TransformersSampler(GreedySampler):
    """Sampling as in transformers' `generate`, with the random numbers of `torch.multinomial`.

    Args:
        temperature, top_k, top_p: None = not applied.

    Raises:
        ValueError: a number is out of range.
    """

    random = True

    def __init__(self, temperature: Any, top_k: Any, top_p: Any):
        self.key = ("transformers", temperature, top_k, top_p)
        self.warpers = LogitsProcessorList()
        # in transformers' order
        if temperature not in (None, 1.0):
            self.warpers.append(TemperatureLogitsWarper(temperature))
        if top_k not in (None, 0):
            self.warpers.append(TopKLogitsWarper(top_k))
        if top_p is not None and top_p < 1.0:
            self.warpers.append(TopPLogitsWarper(top_p))

    def fill(self, noise: Tensor) -> None:
        noise.exponential_()

    def choose(self, logits: Tensor, noise: Tensor) -> Tensor:
        # what multinomial computes for one sample: argmax p / E, E exponential, samples from p
        ids: Any = None  # these warpers do not read them
        return (self.warpers(ids, logits).softmax(-1) / noise).argmax(-1)


def sampler_of(model: Any, options: dict[str, Any]) -> GreedySampler | None:
    """The sampler of these options of transformers' `generate`.

    None: they or the model's generation config ask for more than one greedy or sampled answer, or are not
    valid; transformers' own loop then does it, or says what is wrong.
    """
    if find_option(model, {name: value for name, value in options.items() if name != "do_sample"}):
        return None
    if not options.get("do_sample"):
        return GreedySampler()
    config = model.generation_config
    found = {
        name: default if (value := getattr(config, name, None)) is None else value
        for name, default in _DEFAULTS.items()
    }
    try:
        return TransformersSampler(**{name: options.get(name, value) for name, value in found.items()})
    except (ValueError, TypeError):
        return None
