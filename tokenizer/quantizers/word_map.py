"""Codebook rows as a function of frozen word vectors (SweetTok, arXiv 2412.10443, language codebook).

V words, T width of a word vector, E width of a row.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from open_unitok.core.errors import UserError

from ..precision import exact_float32

MAPS = ("gcn", "mlp")
GCN_DROPOUT = 0.5  # as published; the plain map has none
LEAK = 0.1  # slope of the plain map's LeakyReLU


class WordMap(nn.Module):
    """(V, E) rows from the frozen vectors of V words; the map alone is trained.

    "gcn" is two graph convolutions, Z = A relu(A X W1' + b1) W2' + b2, with A = D^-1/2 (edges + I) D^-1/2;
    without edges it is a plain two-layer network. "mlp" is Linear, LeakyReLU, Linear.

    Args:
        words, word_dim: V and T.
        edges: number of undirected pairs of words; "gcn" only.
        dropout: between the layers, in training; None = as published.

    Attributes:
        vectors: (V, T) buffer, random until `set_words`, saved with the model.
        edges: (edges, 2) buffer of word numbers.
        is_set: whether the vectors are those of words.
    """

    vectors: Tensor
    edges: Tensor
    is_set: Tensor

    def __init__(
        self,
        words: int,
        word_dim: int,
        outputs: int,
        kind: str = "gcn",
        hidden: int = 256,
        edges: int = 0,
        dropout: float | None = None,
    ) -> None:
        super().__init__()
        if kind not in MAPS:
            raise UserError(f"quantizer_options.map is {kind!r}: it must be {' or '.join(MAPS)}.")
        for name, value, least in (("word_dim", word_dim, 1), ("hidden", hidden, 1), ("edges", edges, 0)):
            if not isinstance(value, int) or value < least:
                raise UserError(f"quantizer_options.{name} is {value!r}: it must be {least} or more.")
        if kind == "mlp" and edges:
            raise UserError("quantizer_options.edges is for map: gcn; with map: mlp it must be 0.")
        self.kind = kind
        self.dropout = (GCN_DROPOUT if kind == "gcn" else 0.0) if dropout is None else dropout
        if not 0 <= self.dropout < 1:
            raise UserError(f"quantizer_options.dropout is {dropout}: it must be from 0 to below 1.")
        self.first = nn.Linear(word_dim, hidden)
        self.second = nn.Linear(hidden, outputs)
        self.register_buffer("vectors", torch.zeros(words, word_dim))
        self.register_buffer("edges", torch.zeros(edges, 2, dtype=torch.int64))
        self.register_buffer("is_set", torch.zeros((), dtype=torch.bool))
        self._cached: tuple[Any, Tensor] | None = None
        self.init_weights()

    def init_weights(self) -> None:
        init.normal_(self.vectors, std=self.vectors.shape[1] ** -0.5)
        init.zeros_(self.edges)
        init.zeros_(self.is_set)

    @torch.no_grad()
    def set_words(self, vectors: Tensor, edges: Tensor | None = None) -> None:
        """Take the (V, T) vectors and (edges, 2) pairs of a word list.

        Raises:
            UserError: they have other sizes than the map, or are not finite.
        """
        edges = torch.zeros(0, 2) if edges is None else edges
        for name, own, given in (("vectors", self.vectors, vectors), ("edges", self.edges, edges)):
            if own.shape != given.shape:
                raise UserError(
                    f"The words' {name} have shape {tuple(given.shape)}, but the quantiser was built for "
                    f"{tuple(own.shape)} (quantizer_options)."
                )
        if not torch.isfinite(vectors).all():
            raise UserError("The words' vectors hold NaN or infinity.")
        self.vectors.copy_(vectors)
        self.edges.copy_(edges)
        self.is_set.fill_(True)

    def forward(self, step: Tensor | None = None) -> Tensor:
        """(V, E) float32 rows; with `step`, a number as a tensor, those of this training step, with dropout.

        The dropped units follow from the step alone: every rank and a resumed run see the same rows. Without
        gradients, in evaluation mode, the rows are computed once for the weights that they follow from.
        """
        if step is not None and self.training:
            return self._rows(step)
        tensors = [*self.parameters(), *self.buffers()]
        needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if self.training or needs_gradient or any(tensor.is_inference() for tensor in tensors):
            return self._rows(None)
        # an optimiser's step, loading and moving change a version, an address or a device
        key = [(tensor.data_ptr(), tensor._version, tensor.device, tensor.dtype) for tensor in tensors]
        if self._cached is None or self._cached[0] != key:
            # no inference tensors: later calls may need gradients of other inputs
            with torch.inference_mode(False), torch.no_grad():
                self._cached = (key, self._rows(None))
        return self._cached[1]

    def _rows(self, step: Tensor | None) -> Tensor:
        with exact_float32(self.vectors.device):
            # on meta tensors, which only count FLOPs, neither graph nor dropout can be computed
            meta = self.vectors.is_meta
            graph = self._graph() if self.kind == "gcn" and not meta else None
            hidden = _apply(self.first, _propagate(graph, self.vectors.float()))
            hidden = F.relu(hidden) if self.kind == "gcn" else F.leaky_relu(hidden, LEAK)
            if step is not None and self.dropout and not meta:
                hidden = hidden * self._kept(hidden, step) / (1 - self.dropout)
            return _apply(self.second, _propagate(graph, hidden))

    def _kept(self, hidden: Tensor, step: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(int(step))
        kept = torch.rand(hidden.shape, generator=generator) >= self.dropout
        return kept.to(hidden.device)

    def _graph(self) -> tuple[Tensor, Tensor, Tensor]:
        """The symmetric (V, V) matrix D^-1/2 (edges + I) D^-1/2: starts of rows, columns, values."""
        words, device = len(self.vectors), self.vectors.device
        own = torch.arange(words, device=device)
        # transformers loads a half-precision model's buffers here as float32, integers too
        first, second = self.edges.long().unbind(dim=1)
        rows, columns = torch.cat([own, first, second]), torch.cat([own, second, first])
        order = (rows * words + columns).argsort()  # rows in order: sums have one order on every device
        rows, columns = rows[order], columns[order]
        counts = torch.bincount(rows, minlength=words)
        values = (counts[rows] * counts[columns]).float().rsqrt()
        return counts.cumsum(0) - counts, columns, values

    def _apply(self, fn: Any, recurse: bool = True) -> "WordMap":
        self._cached = None
        return super()._apply(fn, recurse)


class _Product(torch.autograd.Function):
    """A symmetric sparse matrix (starts, columns, values) times (V, T) inputs."""

    @staticmethod
    def forward(ctx: Any, starts: Tensor, columns: Tensor, values: Tensor, inputs: Tensor) -> Tensor:
        ctx.save_for_backward(starts, columns, values)
        return _weighted_sums(starts, columns, values, inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None, Tensor]:
        # the matrix is its own transpose
        return None, None, None, _weighted_sums(*ctx.saved_tensors, gradients[0].contiguous())  # pyright: ignore


def _weighted_sums(starts: Tensor, columns: Tensor, values: Tensor, inputs: Tensor) -> Tensor:
    # without atomic additions, whose order would change the last bits of rows, and codes with them
    return F.embedding_bag(columns, inputs, starts, mode="sum", per_sample_weights=values)


def _propagate(graph: tuple[Tensor, Tensor, Tensor] | None, inputs: Tensor) -> Tensor:
    return inputs if graph is None else _Product.apply(*graph, inputs)  # pyright: ignore


def _apply(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """The layer in float32, whatever the dtype of its weights."""
    return F.linear(inputs, layer.weight.float(), None if layer.bias is None else layer.bias.float())
