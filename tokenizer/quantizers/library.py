"""Quantisers of the package vector-quantize-pytorch behind our interface: FSQ, LFQ, SimVQ, residual VQ.

B batch, N visual tokens, K codes per token, V entries of a code, C width of one row.
"""

import contextlib
import copy
import functools
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_unitok.core.errors import UserError, did_you_mean

from ..precision import exact_float32
from .base import Quantizer, QuantizerOutput

# options of each kind; those that change shapes, draw random numbers or drop codes have no place here
OPTIONS: dict[str, dict[str, Any]] = {
    "FSQ": {"levels": list[int], "preserve_symmetry": bool, "bound_hard_clamp": bool},
    "LFQ": {"codebook_scale": float, "diversity_gamma": float, "spherical": bool,
            "soft_clamp_input_value": float | None},
    "SimVQ": {"rotation_trick": bool, "input_to_quantize_commit_loss_weight": float,
              "frozen_codebook_dim": int | None},
    "ResidualVQ": {"decay": float, "eps": float, "kmeans_init": bool, "kmeans_iters": int,
                   "threshold_ema_dead_code": float, "commitment_weight": float, "rotation_trick": bool,
                   "shared_codebook": bool},
}  # fmt: skip


class LibraryQuantizer(Quantizer):
    """One of `OPTIONS` from vector-quantize-pytorch (extra `library`), with the package's own losses.

    Losses: "vq" (the package's commitment loss; 0 for FSQ, which has none), and for LFQ "entropy". The rows
    of ResidualVQ are moving averages, and its K codes of a token are added, the others concatenated.

    Args:
        codebook_size, codebook_dim: V is the product of FSQ's `levels`, which are C; for LFQ V = 2**C.
        kind: one of `OPTIONS`.
        options: of the package's class.
    """

    row_norm = "none"
    own_options = functools.reduce(operator.or_, OPTIONS.values())

    def __init__(
        self,
        num_codebooks: int,
        codebook_size: int,
        codebook_dim: int,
        kind: str = "FSQ",
        **options: Any,
    ) -> None:
        if kind not in OPTIONS:
            raise UserError(f"quantizer_options.kind is {kind!r}." + did_you_mean(kind, OPTIONS))
        for name in options:
            if name not in OPTIONS[kind]:
                raise UserError(
                    f"quantizer_options.{name} is not an option of kind {kind!r}: {', '.join(OPTIONS[kind])}."
                )
        residual = kind == "ResidualVQ"
        super().__init__(
            [codebook_size] * num_codebooks, codebook_dim if residual else num_codebooks * codebook_dim
        )
        self.kind, self.sums_rows, self.moves_rows = kind, residual, residual
        self.diversity_gamma = options.get("diversity_gamma", 1.0)
        build = _builder(kind, num_codebooks, codebook_size, codebook_dim, options)
        with torch.device("cpu"):  # it reads values while it is built, which the meta device does not have
            modules = _build(build, kind, num_codebooks if kind == "SimVQ" else 1)
        # FSQ and LFQ have constants alone: not in the state dict
        self._constant = None if kind in ("SimVQ", "ResidualVQ") else modules[0]
        self._constants: dict[torch.device, Any] = {}
        if self._constant is None:
            self.library = nn.ModuleList([_without_constants(module) for module in modules])
            self.library.to(torch.get_default_device())

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_constant":  # no submodule
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, latents: Tensor, entropy: bool = False) -> QuantizerOutput:
        if entropy and self.kind != "LFQ":
            raise UserError(f"quantizer 'library' with kind {self.kind!r} has no entropy loss: set it to 0.")
        with exact_float32(latents.device):
            latents = latents.float()
            if latents.is_meta:  # operations are counted alone: some kinds read values
                codes = torch.zeros(
                    *latents.shape[:2], len(self.code_sizes), dtype=torch.int64, device="meta"
                )
                quantised, losses = latents + 0 * self.embed(codes), {"vq": latents.mean()}
            else:
                quantised, codes, losses = self._quantise(latents, entropy)
            return QuantizerOutput(quantised, codes, losses, self.track_usage(codes))

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        training = self.training
        self.eval()  # moving averages stay
        try:
            with exact_float32(latents.device):
                return self._quantise(latents.float(), False)[1]
        finally:
            self.train(training)

    def embed(self, codes: Tensor) -> Tensor:
        rows = torch.stack(
            [F.embedding(codes[..., k], book) for k, book in enumerate(self._table(codes.device))], dim=-2
        )
        return rows.sum(dim=-2) if self.sums_rows else rows.flatten(-2)

    def split(self, latents: Tensor) -> Tensor:
        latents, books = latents.float(), len(self.code_sizes)
        if self.sums_rows:
            return latents.unsqueeze(-2).expand(*latents.shape[:-1], books, -1)
        return latents.unflatten(-1, (books, -1))

    def code_table(self) -> Tensor:
        return self._table(self.usage.device).detach().float()

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        rows = {n: b for n, b in self.named_buffers() if n.endswith(("frozen_codebook", "_codebook.embed"))}
        return dict(self.named_parameters()) | rows  # FSQ and LFQ have none: their options tell all

    def _module(self, device: torch.device) -> Any:
        """The package's FSQ or LFQ on a device."""
        if device not in self._constants:
            self._constants[device] = copy.deepcopy(self._constant).to(device)  # pyright: ignore
        return self._constants[device].train(self.training)

    def _table(self, device: torch.device) -> Tensor:
        """(K, V, C)."""
        if self.kind == "SimVQ":
            return torch.stack([module.codebook for module in self.library])  # pyright: ignore
        if self.kind == "ResidualVQ":
            return self.library[0].codebooks  # pyright: ignore
        module = self._module(device)
        rows = module.implicit_codebook if self.kind == "FSQ" else module.maybe_l2norm(module.codebook)
        return rows.expand(len(self.code_sizes), -1, -1)

    def _quantise(self, latents: Tensor, entropy: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(B, N, latent_dim) -> quantised, codes (B, N, K), losses."""
        zero = latents.new_zeros(())
        if self.kind == "FSQ":
            quantised, codes = self._module(latents.device)(latents)
            return quantised, codes.long(), {"vq": zero}
        if self.kind == "LFQ":
            with _mean_over_ranks(self.average_over_ranks):
                found, parts = self._module(latents.device)(latents, return_loss_breakdown=True)
            spread = parts.per_sample_entropy - self.diversity_gamma * parts.batch_entropy
            losses = {"vq": parts.commitment + zero, "entropy": spread if entropy else zero}
            return found.quantized, found.indices.long(), losses
        if self.kind == "ResidualVQ":
            quantised, codes, losses = self.library[0](latents, freeze_codebook=self.frozen)
            return quantised, codes, {"vq": losses.sum()}
        chunks = latents.unflatten(-1, (len(self.code_sizes), -1)).unbind(dim=-2)
        found = [module(chunk.contiguous()) for module, chunk in zip(self.library, chunks)]
        quantised, codes, losses = zip(*found)
        vq = torch.stack(losses).mean()
        return torch.cat(quantised, dim=-1), torch.stack(codes, dim=-1), {"vq": vq}


@contextlib.contextmanager
def _mean_over_ranks(average: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
    """Replace the package's mean over processes, which drops the result of its own all_reduce."""
    from vector_quantize_pytorch import lookup_free_quantization as lfq  # pyright: ignore

    theirs = lfq.maybe_distributed_mean
    lfq.maybe_distributed_mean = average or (lambda share: share)
    try:
        yield
    finally:
        lfq.maybe_distributed_mean = theirs


def _builder(kind: str, books: int, entries: int, width: int, options: dict[str, Any]) -> tuple[str, dict]:
    """Class name and keyword arguments.

    Raises:
        UserError: sizes that the kind does not have.
    """
    if kind == "FSQ":
        levels = list(options.get("levels") or [])
        if len(levels) != width or math.prod(levels) != entries:
            raise UserError(
                f"quantizer_options.levels is {levels}: kind FSQ needs codebook_dim = {width} levels, whose "
                f"product is codebook_size = {entries}."
            )
        return kind, {**options, "levels": levels, "num_codebooks": books, "keep_num_codebooks_dim": True}
    if kind == "LFQ":
        if 2**width != entries:
            raise UserError(f"codebook_size is {entries}: kind LFQ has 2**codebook_dim = {2**width} entries.")
        fixed = {"num_codebooks": books, "keep_num_codebooks_dim": True, "has_projections": False}
        weights = {"entropy_loss_weight": 1.0, "commitment_loss_weight": 1.0}  # ours weigh the losses
        return kind, {**options, **fixed, **weights, "codebook_size": entries, "dim": books * width}
    own = {**options, "dim": width, "codebook_size": entries}
    return kind, own | ({"num_quantizers": books} if kind == "ResidualVQ" else {})


def _build(builder: tuple[str, dict], kind: str, count: int) -> list[Any]:
    try:
        import vector_quantize_pytorch as package  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"quantizer 'library' with kind {kind!r} needs the package vector-quantize-pytorch: pip install "
            '"open-unitok[library]".'
        ) from error
    name, arguments = builder
    try:
        return [getattr(package, name)(**arguments) for _ in range(count)]
    except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"quantizer_options of kind {kind!r}: {reason}") from error


def _without_constants(module: nn.Module) -> nn.Module:
    """The module with plain tensors for buffers that are not saved: loading would leave them unset."""
    for part in module.modules():
        for name in list(part._non_persistent_buffers_set):
            value = part._buffers.pop(name)
            part._non_persistent_buffers_set.discard(name)
            object.__setattr__(part, name, value)
    return module
