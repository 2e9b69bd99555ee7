"""Decoding backends: eager torch, CUDA graph, compiled C++; `choose_backend` picks one.

`base.Backend` is the protocol. A new backend is one file, one entry of `BACKENDS` and one line of
`choose_backend`.
"""

from typing import Any

from open_unitok.core.errors import UserError

from . import cuda_graph, native, native_text
from .base import Backend
from .eager import Eager

QUANTIZATIONS = (None, "int8")
BACKENDS: dict[str, Any] = {"eager": Eager, "cuda_graph": cuda_graph.CudaGraph, "native": native.Native}

__all__ = ["BACKENDS", "Backend", "check_known_quantization", "choose_backend"]


def check_known_quantization(quantization: str | None) -> None:
    """
    Raises:
        UserError: `quantization` is unknown.
    """
    if quantization not in QUANTIZATIONS:
        raise UserError(f"quantization is {quantization!r}; it must be None or 'int8'.")


def choose_backend(
    model: Any,
    *,
    quantization: str | None = None,
    num_steps: int = 0,
    text_options: dict[str, Any] | None = None,
) -> str:
    """The fastest backend for this model on this machine: a key of `BACKENDS`.

    Args:
        quantization: of the weights: None = the model's dtype; "int8" = 8 bits with one scale per row.
        num_steps: number of decode steps; capturing a CUDA graph pays off only over several.
        text_options: for text instead of images: the options of transformers' `generate`. "eager" then means
            transformers' own loop.

    Raises:
        UserError: `quantization` is unknown, or not available for this model on this machine.
    """
    check_known_quantization(quantization)
    # native runs on a CPU, cuda_graph on CUDA: a model supports at most one of them
    if native.supports_native(model) and (
        text_options is None or native_text.supports_options(model, text_options)
    ):
        return "native"
    if quantization is not None:
        raise UserError(
            f"quantization = {quantization!r} needs a LLaMA decoder on a CPU and a C++ compiler; use None."
        )
    if text_options is None and cuda_graph.supports_cuda_graph(model, num_steps):
        return "cuda_graph"
    return "eager"
