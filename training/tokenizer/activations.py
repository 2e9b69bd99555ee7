"""Memory of activations in a training step of the tokenizer, by part, counted on the meta device.

Counted is what autograd keeps for the backward pass, each storage once, by the rules of CUDA's autocast; of
recomputed parts their inputs, and the largest part's activations while it is recomputed. The tests compare it
with CPU runs; bf16's casts were compared with an emulated CUDA device (2 % apart). Not run on a GPU yet.

B images, parts: of the network and the losses.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from open_unitok.tokenizer import UniTok

from .config import TokenizerRunConfig
from .gan import sample_views
from .image_losses import PIECE
from .losses import discriminator_loss, generator_loss
from .model import BLOCK_STACKS, keep_blocks

# operations by the dtype in which torch's autocast runs them on CUDA
_BF16 = {"linear", "conv1d", "conv2d", "conv3d", "conv_transpose2d", "matmul", "__matmul__", "mm", "bmm"}
_BF16 |= {"addmm", "baddbmm", "einsum", "scaled_dot_product_attention"}
_FLOAT32 = {"layer_norm", "group_norm", "softmax", "log_softmax", "cross_entropy", "exp", "log", "norm"}
_FLOAT32 |= {"pow", "rsqrt", "sum", "prod", "cumsum", "mse_loss", "l1_loss", "softplus", "normalize"}
# parts of a model by their modules' names
_PARTS = {"text_encoder": "text tower", "quantizer": "quantiser"}
_PARTS |= {f"{name}_projection": "projections" for name in ("down", "up", "variance")}


class Part(NamedTuple):
    """Bytes of one part of a step, for each image."""

    kept: float  # for the backward pass
    recomputed: float = 0.0  # while that of its parts which needs most is recomputed


class Activations(NamedTuple):
    """Activations of a step, with or without recomputation.

    Attributes:
        parts: of the model and the losses; a loss of reconstructions keeps its own only while it is computed.
        peaks: bytes of a batch while a part is recomputed, and at the end of the forward pass: (for each
            image, fixed).
        losses: bytes of each image of LPIPS, of the generator's and of the discriminator's pass.
        pieces: images that LPIPS and the generator's pass see at a time; None = all.
        adds_losses: whether their activations are kept until the backward pass, all together.
    """

    parts: dict[str, Part]
    peaks: list[tuple[float, float]]
    losses: dict[str, float]
    pieces: int | None
    adds_losses: bool

    def of_batch(self, images: int, decoded: int) -> float:
        """Bytes at the peak of a step over a micro-batch, of which some images are decoded."""
        # with fewer images decoded the decoder keeps less; its share is that of what is kept
        kept = {name: part.kept for name, part in self.parts.items() if name not in self.losses}
        whole = sum(kept.values()) or 1.0
        share = sum(
            size * (decoded if name.startswith("decoder") else images) for name, size in kept.items()
        ) / (whole * images)
        peaks = [share * images * each + fixed for each, fixed in self.peaks]
        piece = min(decoded, self.pieces or decoded)
        during = [self.losses[name] * piece for name in ("LPIPS", "discriminator") if name in self.losses]
        at_losses = peaks[-1] + (sum(during) if self.adds_losses else max(during, default=0.0))
        return max(*peaks, at_losses, self.losses.get("discriminator's step", 0.0) * decoded)


class CudaAutocast(TorchFunctionMode):
    """The casts of torch's autocast to bf16 on CUDA, on a device that has no autocast (meta) or other rules.

    Acts where autocast for the CPU is on, so that code which switches it off has its way.

    Attributes:
        casts: storages of copies of weights, which are not activations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.casts: dict[int, Any] = {}
        self._weights: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention" and args[0].is_meta:
            func = _fused_attention
        low, high = name in _BF16, name in _FLOAT32
        if (low or high) and torch.is_autocast_enabled("cpu"):
            cast = self._to_bf16 if low else _to_float32
            args = [cast(a) for a in args]
            kwargs = {key: cast(value) for key, value in kwargs.items()}
        return func(*args, **kwargs)

    def _to_bf16(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not isinstance(value, nn.Parameter):
            return value.to(torch.bfloat16)
        if id(value) not in self._weights:  # one copy of a weight for the whole pass
            self._weights[id(value)] = cast = value.to(torch.bfloat16)
            self.casts[cast.untyped_storage()._cdata] = cast.untyped_storage()
        return self._weights[id(value)]


class _FusedAttention(torch.autograd.Function):
    """Keeps what the kernels of GPUs keep: on the meta device torch would compute attention in steps."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = query.new_empty((*query.shape[:-1], value.shape[-1]))
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)  # logarithms of the softmax's sums
        ctx.save_for_backward(query, key, value, mixed, sums)
        return mixed


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return _FusedAttention.apply(query, key, value)  # pyright: ignore[reportReturnType]


def _to_float32(value: Any) -> Any:
    low = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if low else value


class Recorder:
    """Counts what autograd keeps, by part; use `recording()` around the forward pass.

    Args:
        weights: modules whose parameters and buffers are not activations.
    """

    def __init__(self, *weights: nn.Module) -> None:
        tensors = [t for module in weights for t in (*module.parameters(), *module.buffers())]
        self.ignored = {t.untyped_storage()._cdata for t in tensors}
        self.kept: dict[int, tuple[str, Any]] = {}  # storage -> part; it is held, or its number is used again
        self.recomputed: dict[str, int] = {}
        self.peaks: list[int] = []  # bytes while each recomputed part is, and at the end of each recording
        self.autocast: CudaAutocast | None = None
        self._part = "others"
        self._handles: list[Any] = []

    @contextlib.contextmanager
    def recording(self, part: str, autocast: bool = False) -> Iterator[None]:
        """Count what the code inside keeps, for `part`; under the rules of CUDA's autocast if it is to."""
        before, self._part = self._part, part
        mode = contextlib.nullcontext()
        if self.autocast is None:  # without autocast, too: attention is that of the kernels
            mode = self.autocast = CudaAutocast()
        cpu = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
        with mode, cpu, torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
            yield
        self._part, self.autocast = before, None if mode is self.autocast else self.autocast
        # the gradient of the largest tensor is in memory beside it
        self.peaks.append(self.total + max((s.nbytes() for _, s in self.kept.values()), default=0))

    @property
    def total(self) -> int:
        """Bytes that are kept so far."""
        return sum(storage.nbytes() for _, storage in self.kept.values())

    def watch(self, name: str, module: nn.Module) -> None:
        """Count what `module` keeps for the part `name`, the rest of its caller's for the caller's part."""
        outer: list[str] = []

        def enter(*_: Any) -> None:
            outer.append(self._part)
            self._part = name

        def leave(*_: Any) -> None:
            self._part = outer.pop()

        self._handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

    def close(self) -> None:
        """Remove the hooks of `watch`."""
        for handle in self._handles:
            handle.remove()

    def recompute(self, part: Callable[..., Any], *inputs: Any) -> Any:
        """In place of torch's checkpoint: the inputs are kept, the activations counted as recomputed."""
        before, name = self._part, getattr(getattr(part, "__self__", None), "__name__", "")
        if name.startswith("_project_"):  # methods of UniTok, not modules
            self._part = "projections"
        for value in inputs:
            if isinstance(value, Tensor) and value.dtype.is_floating_point:
                self._keep(value)
        own: dict[int, Any] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if not self._is_weight(storage) and storage._cdata not in self.kept:
                own[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = part(*inputs)
        sizes = [storage.nbytes() for storage in own.values()]
        size = sum(sizes) + max(sizes, default=0)
        self.recomputed[self._part] = max(self.recomputed.get(self._part, 0), size)
        self._part = before
        # what later parts keep is gone when this one is recomputed
        self.peaks.append(self.total + size)
        return outputs

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not self._is_weight(storage):
            self.kept.setdefault(storage._cdata, (self._part, storage))
        return tensor

    def _is_weight(self, storage: Any) -> bool:
        return storage._cdata in self.ignored or (
            self.autocast is not None and storage._cdata in self.autocast.casts
        )

    def by_part(self) -> dict[str, tuple[int, int]]:
        """Part -> bytes kept, and most bytes recomputed."""
        found = {part: 0 for part, _ in self.kept.values()} | dict.fromkeys(self.recomputed, 0)
        for part, storage in self.kept.values():
            found[part] += storage.nbytes()
        return {part: (size, self.recomputed.get(part, 0)) for part, size in found.items()}


def watch_parts(recorder: Recorder, model: UniTok, recomputes: bool, what: str = "all") -> None:
    """Let the recorder count the parts of a model, and recompute what gradient checkpointing covers.

    Args:
        recomputes: as `engine.gradient_checkpointing`; what: as `recompute`.
    """
    for side in ("encoder", "decoder"):
        module = model.get_submodule(side)
        recorder.watch(f"{side} convolutions", module)
        for part in module.modules():
            if isinstance(part, BLOCK_STACKS):
                recorder.watch(f"{side} blocks", part)
    for name, part in _PARTS.items():
        if (module := getattr(model, name, None)) is not None:
            recorder.watch(part, module)
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module._gradient_checkpointing_func = recorder.recompute  # pyright: ignore
            module.gradient_checkpointing = recomputes  # pyright: ignore
    if recomputes and what == "convolutions":
        keep_blocks(model)


def measure_activations(
    model: UniTok, networks: Mapping[str, Any], config: TokenizerRunConfig
) -> dict[bool, Activations]:
    """Activations of a step, without and with `engine.gradient_checkpointing`.

    Args:
        model: in training mode, on the meta device; `networks`: "lpips" and "discriminator", if the run has
            them.
    """
    losses = {
        name: float(record(2) - record(1))
        for name, record in _loss_recorders(model, networks, config).items()
    }
    options = config.discriminator
    balances = "discriminator" in networks and options.adaptive is not None
    whole = "discriminator" in networks and options.kind == "dino" and options.norm == "bn"
    found = {}
    for recomputes in (False, True):
        # once with one image and once with two: the difference is what depends on the batch
        one, two = (_record_model(model, config, count, recomputes) for count in (1, 2))
        parts = {name: Part(two[0][name][0] - k, two[0][name][1] - r) for name, (k, r) in one[0].items()}
        peaks = [(float(b - a), float(2 * a - b)) for a, b in zip(one[1], two[1], strict=True)]
        parts |= {name: Part(size) for name, size in losses.items()}
        pieces = PIECE if recomputes and not whole else None
        found[recomputes] = Activations(parts, peaks, losses, pieces, not (recomputes or balances))
    return found


def describe_activations(
    activations: Mapping[bool, Activations], peaks: Mapping[bool, float], images: int, dtype: str, on: bool
) -> list[str]:
    """Lines on what each part keeps for an image, and on the peak of a rank.

    Args:
        peaks: bytes of `images` images; `on`: whether the run recomputes activations.
    """
    lines = ["", f"MiB of activations per image ({dtype}), without and with engine.gradient_checkpointing"]
    lines.append(f"  {'':22}{'kept':>10}{'kept':>10}{'recomputed':>12}")
    plain, other = activations[False], activations[True]
    order = [*(name for name in other.parts if name not in plain.parts), *plain.parts]
    for name in order:
        before, after = plain.parts.get(name, Part(0.0)), other.parts.get(name, Part(0.0))
        sizes = before.kept, after.kept, after.recomputed
        if max(sizes) >= 2**20 / 20:
            lines.append(
                f"  {name:22}{sizes[0] / 2**20:10.1f}{sizes[1] / 2**20:10.1f}{sizes[2] / 2**20:12.1f}"
            )
    if other.losses and other.pieces:
        lines.append(f"  with it LPIPS and discriminator hold {other.pieces} images at a time")
    for recomputes in (False, True):
        mark = "*" if recomputes == on else " "
        how = "with" if recomputes else "without"
        lines.append(f"{mark} {how:7} it {peaks[recomputes] / 2**30:8.2f} GiB of {images} images at the peak")
    return lines


def _record_model(
    model: UniTok, config: TokenizerRunConfig, count: int, recomputes: bool
) -> tuple[dict[str, tuple[int, int]], list[int]]:
    """By part and at each peak, see `Recorder`, of `count` images and their captions."""
    recorder = Recorder(model)
    watch_parts(recorder, model, recomputes, config.recompute)
    with torch.device("meta"):
        pixels = torch.zeros(count, 3, *model.config.image_shape)
        ids = None
        if config.losses.clip:
            ids = torch.zeros(count, model.config.text_context_length, dtype=torch.int64)
        with recorder.recording("others", config.engine.dtype != "fp32"):
            model(pixels, ids, entropy=config.losses.entropy > 0)
    recorder.close()
    return recorder.by_part(), recorder.peaks


def _loss_recorders(
    model: UniTok, networks: Mapping[str, Any], config: TokenizerRunConfig
) -> dict[str, Callable[[int], int]]:
    """Loss -> a function of the number of images that returns the bytes which its pass keeps."""
    options, shape = config.discriminator, model.config.image_shape
    discriminator: Any = networks.get("discriminator")

    def record(loss: Callable[[Tensor], Any], *modules: nn.Module) -> Callable[[int], int]:
        def run(count: int) -> int:
            recorder = Recorder(*modules)
            images = torch.zeros(count, 3, *shape, device="meta", requires_grad=True)
            with recorder.recording("loss", config.engine.dtype != "fp32"):
                loss(images)
            return recorder.total

        return run

    def generator(images: Tensor) -> Tensor:
        views = sample_views(discriminator, 0, 0, range(len(images)), shape)
        noise = options.augment, options.cutout
        return generator_loss(discriminator, images, views["generator"], 0.0, *noise, options.generator)

    def both(images: Tensor) -> Any:
        views = sample_views(discriminator, 0, 0, range(len(images)), shape)
        kinds = options.loss, options.consistency, 0.0, options.augment, options.cutout
        return discriminator_loss(discriminator, images.detach(), images, views, *kinds)

    found = {}
    if "lpips" in networks:
        lpips = networks["lpips"]
        found["LPIPS"] = record(lambda images: lpips(images, images.detach()), lpips)
    if discriminator is not None:
        own = [discriminator, discriminator.dino] if options.kind == "dino" else [discriminator]
        found["discriminator"] = record(generator, *own)
        found["discriminator's step"] = record(both, *own)
    return found
