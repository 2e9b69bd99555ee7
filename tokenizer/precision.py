"""The precision policy of a tokenizer: which weights stay in float32 and which products are exact.

Codes are an argmax over similarities, so rounding changes them where two entries are almost equally close:
bfloat16 in the encoder alone changes 2 to 5 % of them. Therefore:

1. `FLOAT32_PARTS` keep float32 weights under `.to(bfloat16)`, `.half()` and `from_pretrained(dtype=...)`.
   They are small compared with encoder and decoder.
2. The products of these parts are true float32 products (`exact_float32`): no autocast, no TF32 on CUDA, no
   bfloat16 shortcut in oneDNN. For given encoder outputs no torch setting changes the codes.
3. Encoder, decoder, text tower and image head run in the dtype of their own weights (`to_dtype_of`), or under
   autocast; embeddings are normalised in float32.
4. Losses of the quantiser and of LPIPS are float32.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

FLOAT32_PARTS = ("down_projection", "quantizer", "up_projection")
_HALF = (torch.float16, torch.bfloat16)


@contextlib.contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Make float32 matrix products exact: autocast, TF32 and bfloat16 shortcuts are off inside."""
    # The precision switches are global, autocast is per thread: restore both, also after an exception.
    backends: list[Any] = [torch.backends.cuda.matmul]
    backends.append(torch.backends.mkldnn.matmul)  # pyright: ignore[reportAttributeAccessIssue]
    before = [backend.fp32_precision for backend in backends]
    autocast = contextlib.nullcontext()
    if torch.amp.is_autocast_available(device.type):
        autocast = torch.autocast(device.type, enabled=False)
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with autocast:
            yield
    finally:
        for backend, precision in zip(backends, before):
            backend.fp32_precision = precision


def spare_float32_parts(
    model: nn.Module, convert: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Wrap the `convert` of `Module._apply`: tensors of `FLOAT32_PARTS` change device, not dtype."""
    # Compare by identity: `_apply` passes parameters, buffers and gradients without their names.
    spared = set()
    for part in FLOAT32_PARTS:
        for tensor in model.get_submodule(part).state_dict(keep_vars=True).values():
            spared |= {id(tensor), id(tensor.grad)} - {id(None)}

    def convert_or_spare(tensor: torch.Tensor) -> torch.Tensor:
        converted = convert(tensor)
        # Undo only conversions to half precision: `.double()` and moves between devices apply.
        if id(tensor) in spared and converted.dtype in _HALF:
            return tensor.to(converted.device)
        return converted

    return convert_or_spare


def to_dtype_of(module: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in the dtype of the module's weights; float32 for a module with `reads_float32`."""
    return tensor.float() if getattr(module, "reads_float32", False) else tensor.to(_weight_dtype(module))


def _weight_dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
