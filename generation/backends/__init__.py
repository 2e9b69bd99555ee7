"""Decoding backends: torch operators, CUDA graph, compiled C++; `choose_backend` picks one.

`base.Backend` is the protocol. A new backend is one file, one entry of `BACKENDS` and one line of
`choose_backend`.
"""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from open_unitok.core.errors import UserError
from open_unitok.mllm.class_conditional import ClassConditionalConfig

from ..sampling import Sampling
from . import cuda_graph, native, native_text
from .base import Backend
from .captured_step import borrow_step, release_steps, round_up
from .class_conditional import ClassCudaGraph, ClassEager
from .eager import Eager
from .module_changes import find_module_change, unreached_hooks
from .text_samplers import sampler_of

QUANTIZATIONS = (None, "int8")
BACKENDS: dict[str, Any] = {"torch": Eager, "cuda_graph": cuda_graph.CudaGraph, "native": native.Native}
CLASS_BACKENDS: dict[str, Any] = {"torch": ClassEager, "cuda_graph": ClassCudaGraph}
_OBSTACLES = {"cuda_graph": cuda_graph.cuda_graph_obstacle, "native": native.native_obstacle}
BACKEND_NAMES = ("auto", *BACKENDS)

__all__ = [
    "BACKENDS",
    "BACKEND_NAMES",
    "CLASS_BACKENDS",
    "Backend",
    "backends_of",
    "check_backend",
    "check_known_quantization",
    "choose_backend",
    "open_backend",
    "release_steps",
]

_log = logging.getLogger(__name__)


def check_known_quantization(quantization: str | None) -> None:
    """
    Raises:
        UserError: `quantization` is unknown.
    """
    if quantization not in QUANTIZATIONS:
        raise UserError(f"quantization is {quantization!r}; it must be None or 'int8'.")


def backends_of(model: Any) -> dict[str, Any]:
    """The backends of this kind of model, by name."""
    is_class_conditional = model.config.model_type == ClassConditionalConfig.model_type
    return CLASS_BACKENDS if is_class_conditional else BACKENDS


def open_backend(
    model: Any, name: str, rows: Sequence[Sequence[int]], images: int, sampling: Sampling
) -> AbstractContextManager[Backend]:
    """Context manager: the backend `name` for one batch; the captured one continues with the graph of an
    earlier batch of the same shape.

    Args:
        rows: R prompts of text ids, or R classes, of `images` images.
    """
    kind = backends_of(model)[name]
    if name != "cuda_graph":
        return contextlib.nullcontext(kind(model))
    capacity = round_up(max(map(len, rows)) + model.config.num_image_tokens - 1)
    # the guidance is a tensor of the step
    settings = dataclasses.replace(sampling, guidance=1.0, guidance_schedule="constant", guidance_interval=-1)
    return _open_captured(kind, model, ("image", images, len(rows), capacity, settings))


@contextlib.contextmanager
def _open_captured(kind: Any, model: Any, key: Hashable) -> Iterator[Backend]:
    with borrow_step(model, key) as captured:
        yield kind(model, captured)


def check_backend(backend: str) -> None:
    """
    Raises:
        UserError: `backend` is unknown.
    """
    if backend not in BACKEND_NAMES:
        raise UserError(f"backend is {backend!r}; it must be one of {', '.join(BACKEND_NAMES)}.")


def choose_backend(
    model: Any,
    backend: str = "auto",
    *,
    num_steps: int | None = None,
    text_options: dict[str, Any] | None = None,
) -> str:
    """The backend that generates with this model on this machine: a key of `BACKENDS`.

    "auto" is the fastest one that gives the results of "torch": the C++ steps on a CPU, a captured graph on
    CUDA. Both bypass the modules' `forward`, so a model with hooks, adapters, parametrisations or changed
    methods runs in torch. The choice is logged once; losing a faster backend to such a change is a warning.

    Args:
        backend: "auto", or a key of `BACKENDS`.
        num_steps: number of decode steps if known; capturing a CUDA graph pays off only over several.
        text_options: for text instead of images: the options of transformers' `generate`. "torch" then means
            transformers' own loop; a captured graph covers greedy ids and sampling with do_sample,
            temperature, top_k and top_p.

    Raises:
        UserError: `backend` is unknown, or cannot run this model, on this machine, with these options.
    """
    check_backend(backend)
    fast = "cuda_graph" if model.device.type == "cuda" else "native"
    if backend == "torch":
        chosen, obstacle = "torch", None
    elif backend in ("auto", fast):
        change, obstacle = find_module_change(model), "it does not run class-conditional models"
        if fast in (table := backends_of(model)):
            obstacle = None if table is CLASS_BACKENDS else _OBSTACLES[fast](model)
        obstacle = change or obstacle
        if change:
            release_steps(model)  # adapters and hooks do not act on what is captured
        chosen = "torch" if obstacle else fast
        if change and backend == "auto":
            _warn_once(f"backend = auto: torch instead of {fast}, as {change}.")
    else:
        place = "CUDA" if backend == "cuda_graph" else "a CPU"
        obstacle = f"it runs on {place}, and the model is on {model.device}"
        chosen = "torch"
    if obstacle and backend != "auto":
        raise UserError(f"backend = {backend!r} cannot run this model: {obstacle}. Use 'auto' or 'torch'.")
    if text_options is None:
        for name in unreached_hooks(model):
            _warn_once(f"The hooks of {name} are not called: decoding calls its parts. Attach them to those.")
    # the same results either way, for requests that the fast path does not cover
    elif chosen == "cuda_graph" and sampler_of(model, text_options) is None:
        return "torch"
    elif chosen == "native" and (option := native_text.find_option(model, text_options)):
        if backend == "native":
            raise UserError(f"backend = 'native' answers greedily, without {option}: use 'auto' or 'torch'.")
        return "torch"
    if chosen == "cuda_graph" and num_steps is not None and num_steps < cuda_graph.MIN_STEPS:
        return "torch"
    _log_once(f"Backend: {chosen}.")
    return chosen


@functools.cache
def _log_once(text: str) -> None:
    _log.info(text)


@functools.cache
def _warn_once(text: str) -> None:
    _log.warning(text)
