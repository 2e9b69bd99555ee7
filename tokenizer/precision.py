"""The precision policy of a tokenizer: which weights stay in float32 and which products are exact.

Codes are an argmax over similarities, so rounding changes them where two entries are almost equally close:
bfloat16 in the encoder alone changes 2 to 5 % of them. Therefore:

1. `FLOAT32_PARTS` keep float32 weights under `.to(bfloat16)`, `.half()` and `from_pretrained(dtype=...)`.
   They are small compared with encoder and decoder.
2. The products and convolutions of these parts are true float32 (`exact_float32`): no autocast, no TF32 on
   CUDA, no bfloat16 shortcut in oneDNN. For given encoder outputs no torch setting changes the codes.
3. Encoder, decoder, text tower and image head run in the dtype of their own weights (`to_dtype_of`), or under
   autocast; embeddings are normalised in float32. Outside of training the encoder's own products and
   convolutions are exact as well where they are float32 (`exact_products`): torch's default would run
   convolutions in TF32 on CUDA, with other codes than on a CPU. The pixel decoder follows torch's settings.
4. Losses of the quantiser and of LPIPS are float32.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch
from torch import nn

FLOAT32_PARTS = ("down_projection", "quantizer", "up_projection")
_HALF = (torch.float16, torch.bfloat16)

# torch's slots of float32 precision. One without a value of its own has that of (backend, "all"), then of
# ("generic", "all"). The older switches, `set_float32_matmul_precision` and `cudnn.allow_tf32`, write the
# slots and flags of their own; their getters raise where the two disagree, so both are changed together.
_MATMUL = (("cuda", "matmul"), ("mkldnn", "matmul"))
_CUDNN = (("cuda", "conv"), ("cuda", "rnn"))  # `cudnn.allow_tf32` stands for both
_SLOTS = (*_MATMUL, *_CUDNN, ("mkldnn", "conv"))
_EXACT = ("none", "ieee")  # nothing, and float32, are exact
_get, _set = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
_lock, _depth = threading.Lock(), 0
_restore: Callable[[], None] = lambda: None  # noqa: E731


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Make float32 matrix products and convolutions exact on every device, without a change of autocast.

    torch's switches belong to the process, not to a thread: the first thread that enters sets them, and the
    last one that leaves restores the caller's. A thread outside computes exactly, too, in the meantime.
    """
    _enter()
    try:
        yield
    finally:
        _leave()


@contextlib.contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Make float32 products exact (`exact_products`) and keep them float32: autocast is off inside."""
    autocast = contextlib.nullcontext()
    # the meta device has no autocast: plans imitate it where the CPU's is on
    kind = "cpu" if device.type == "meta" else device.type
    if torch.amp.is_autocast_available(kind):  # autocast is per thread
        autocast = torch.autocast(kind, enabled=False)
    with exact_products(), autocast:
        yield


@contextlib.contextmanager
def float32_projections(device: torch.device, training: bool) -> Iterator[None]:
    """float32 products of the projections: exact (`exact_float32`), in training on CUDA by torch's settings.

    These are 1.3 % of a training step's products, but would take 8 % of its time without tensor cores.
    """
    if not (training and device.type == "cuda"):
        with exact_float32(device):
            yield
        return
    with torch.autocast("cuda", enabled=False):
        yield


@contextlib.contextmanager
def tf32_products() -> Iterator[None]:
    """Let float32 matrix products run in TF32 on CUDA, outside of `exact_products`; not run on a GPU yet."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch._disable_dynamo  # lazy, unlike torch.compiler.disable: the compiler's import takes seconds
def _enter() -> None:
    global _depth, _restore
    with _lock:
        if not _depth:
            _restore = _set_exact()
        _depth += 1


@torch._disable_dynamo
def _leave() -> None:
    global _depth
    with _lock:
        _depth -= 1
        if not _depth:
            _restore()


def _set_exact() -> Callable[[], None]:
    """Set all switches to exact; returns what restores them."""
    # read before anything changes; "none" is exact by default
    before = {slot: _own_value(*slot) for slot in _SLOTS}
    changed = {slot for slot in _SLOTS if _get(*slot) not in _EXACT}
    for slot in changed:
        _set(*slot, "ieee")
    # readable only now: with exact slots the older getters do not raise, or tell the flag by raising
    matmul = torch.get_float32_matmul_precision()
    try:
        cudnn = torch._C._get_cudnn_allow_tf32()
    except RuntimeError:
        cudnn = True
    if matmul != "highest":
        torch.set_float32_matmul_precision("highest")
        changed.update(_MATMUL)
    if cudnn:
        torch._C._set_cudnn_allow_tf32(False)
        changed.update(_CUDNN)
        for slot in _CUDNN:  # it empties them, and an empty one may inherit tf32
            _set(*slot, "ieee")

    def restore() -> None:
        if matmul != "highest":
            torch.set_float32_matmul_precision(matmul)
        if cudnn:
            torch._C._set_cudnn_allow_tf32(True)
        for slot in changed:  # after the flags, which write the slots
            _set(*slot, before[slot])

    return restore


def _own_value(backend: str, operation: str) -> str:
    """The value of a slot itself, "none" where it inherits one; torch shows only what applies."""
    value = _get(backend, operation)
    outer = ("generic", "all") if operation == "all" else (backend, "all")
    if backend == "generic" or value == "none" or value != _get(*outer):
        return value
    if value == "ieee":  # rarely written back: counts as the slot's own
        return value
    # equal: another outer value for a moment shows whether the slot follows it; "ieee" harms no other thread
    outer_value = _own_value(*outer)
    _set(*outer, "ieee")
    follows = _get(backend, operation) == "ieee"
    _set(*outer, outer_value)
    return "none" if follows else value


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
