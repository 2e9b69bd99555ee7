"""Codebooks whose rows are functions of words: SweetTok's two half-codes (arXiv 2412.10443), and UniTok's
quantisation with such rows.

B batch, N visual tokens, K codes per token, V words, E width of a row.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from open_unitok.core.errors import UserError

from ..precision import exact_float32
from .base import SIMILARITY_BLOCK, Quantizer, QuantizerOutput, check_gradient, pass_through
from .multi_codebook import MultiCodebookQuantizer
from .word_map import WordMap

NUM_CODES = 3  # [nearest adjective, second nearest adjective, nearest noun]


class LanguageQuantizer(Quantizer):
    """A latent of unit norm is cut into halves: the first becomes the mean of the two nearest adjectives, the
    second the nearest noun, by Euclidean distance; rows are not normalised.

    The three codes of a token are those of [nearest adjective, second nearest, noun], nouns counted from 0.
    Losses: "vq" = commitment * mse(rows, latents) + codebook * mse of the rows' side, the two halves added.

    Args:
        codebook_dim: width of the latents, 2 E.
        adjectives, nouns: words of each kind, adjectives first in the vectors; None = codebook_size.
        word_dim, map, hidden, edges, dropout: see `WordMap`.
        gradient: see `pass_through`.
    """

    row_norm = "none"
    sums_rows = True

    def __init__(
        self,
        num_codebooks: int,
        codebook_size: int,
        codebook_dim: int,
        adjectives: int | None = None,
        nouns: int | None = None,
        word_dim: int = 512,
        map: str = "gcn",
        hidden: int = 256,
        edges: int = 0,
        dropout: float | None = None,
        commitment: float = 1.0,
        codebook: float = 0.25,
        gradient: str = "straight_through",
    ) -> None:
        adjectives, nouns = adjectives or codebook_size, nouns or codebook_size
        if num_codebooks != NUM_CODES:
            raise UserError(
                f"num_codebooks is {num_codebooks}, but quantizer 'language' has {NUM_CODES} codes per token."
            )
        if codebook_dim % 2:
            raise UserError(f"codebook_dim is {codebook_dim}: quantizer 'language' cuts it into two halves.")
        if adjectives < 2:
            raise UserError("quantizer 'language' needs two adjectives or more.")
        super().__init__([adjectives, adjectives, nouns], codebook_dim)
        self.commitment, self.codebook, self.gradient = commitment, codebook, check_gradient(gradient)
        self.map = WordMap(adjectives + nouns, word_dim, codebook_dim // 2, map, hidden, edges, dropout)

    def forward(self, latents: Tensor, entropy: bool = False) -> QuantizerOutput:
        if entropy:
            raise UserError("quantizer 'language' has no entropy loss: set losses.entropy to 0.")
        with exact_float32(latents.device):
            halves = self._halves(latents)
            rows = self.map(_training_step(self))
            codes = self._search(halves, rows)
            chosen = self._embed_halves(codes, rows)
            vq = self.commitment * F.mse_loss(halves, chosen.detach())
            vq = vq + self.codebook * F.mse_loss(chosen, halves.detach())
            quantised = pass_through(halves, chosen, self.gradient).flatten(-2)
            # a mean over both halves is half the sum of their means
            return QuantizerOutput(quantised, codes, {"vq": 2 * vq}, self.track_usage(codes))

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        with exact_float32(latents.device):
            return self._search(self._halves(latents), self.map())

    def embed(self, codes: Tensor) -> Tensor:
        return self._embed_halves(codes, self.map()).flatten(-2)

    def split(self, latents: Tensor) -> Tensor:
        """(..., 2E) -> (..., 3, 2E): the vector itself, for each code."""
        return self._halves(latents).flatten(-2).unsqueeze(-2).expand(*latents.shape[:-1], NUM_CODES, -1)

    def code_table(self) -> Tensor:
        """(3, V, 2E): half of each adjective in the first half of a row, each noun in the second."""
        rows, (adjectives, _, nouns) = self.map().detach(), self.code_sizes
        width = rows.shape[1]
        table = rows.new_zeros(NUM_CODES, max(adjectives, nouns), 2 * width)
        table[:2, :adjectives, :width] = rows[:adjectives] / 2
        table[2, :nouns, width:] = rows[adjectives:]
        return table

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        return _with_words(self)

    def _halves(self, latents: Tensor) -> Tensor:
        """(..., 2E) -> (..., 2, E), of unit norm as a whole."""
        return F.normalize(latents.float(), dim=-1).unflatten(-1, (2, -1))

    def _embed_halves(self, codes: Tensor, rows: Tensor) -> Tensor:
        """(..., 3) codes -> (..., 2, E)."""
        first, second, noun = codes.unbind(dim=-1)
        adjectives = (F.embedding(first, rows) + F.embedding(second, rows)) / 2
        return torch.stack([adjectives, F.embedding(noun + self.code_sizes[0], rows)], dim=-2)

    @torch.no_grad()
    def _search(self, halves: Tensor, rows: Tensor) -> Tensor:
        """(B, N, 2, E) -> (B, N, 3)."""
        adjectives, nouns = rows.split([self.code_sizes[0], self.code_sizes[2]])
        first = _nearest(halves[..., 0, :], adjectives, 2)
        return torch.cat([first, _nearest(halves[..., 1, :], nouns, 1)], dim=-1)


class LanguageMapQuantizer(MultiCodebookQuantizer):
    """UniTok's multi-codebook quantisation with the rows of V words: same search, losses and outputs.

    Args:
        codebook_size: V, the number of words; every sub-codebook has all of them, with an own map.
        word_dim, map, hidden, edges, dropout: see `WordMap`.
        gradient: see `pass_through`.
    """

    def __init__(
        self,
        num_codebooks: int,
        codebook_size: int,
        codebook_dim: int,
        word_dim: int = 512,
        map: str = "mlp",
        hidden: int = 256,
        edges: int = 0,
        dropout: float | None = None,
        gradient: str = "straight_through",
    ) -> None:
        super().__init__(num_codebooks, codebook_size, codebook_dim, gradient)
        self.register_parameter("codebooks", None)
        self.map = WordMap(codebook_size, word_dim, num_codebooks * codebook_dim, map, hidden, edges, dropout)
        self._rows_of_step: Tensor | None = None

    def init_weights(self) -> None:
        Quantizer.init_weights(self)

    def forward(self, latents: Tensor, entropy: bool = False) -> QuantizerOutput:
        self._rows_of_step = self._books(self.map(_training_step(self)))
        try:  # search, losses and output of one step see the same dropout
            return super().forward(latents, entropy)
        finally:
            self._rows_of_step = None

    def stored_rows(self) -> Tensor:
        return self._books(self.map()) if self._rows_of_step is None else self._rows_of_step

    def code_table(self) -> Tensor:
        return self.stored_rows().detach()

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        return _with_words(self)

    def _books(self, rows: Tensor) -> Tensor:
        """(V, K*C) -> (K, V, C)."""
        return rows.unflatten(-1, (len(self.code_sizes), -1)).transpose(0, 1)


def _training_step(quantizer: Quantizer) -> Tensor | None:
    """The number of the training step for the map's dropout; None where nothing is trained."""
    return quantizer.calls if quantizer.training and not quantizer.frozen else None


def _with_words(quantizer: LanguageQuantizer | LanguageMapQuantizer) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = dict(quantizer.named_parameters())
    return tensors | {f"map.{name}": getattr(quantizer.map, name) for name in ("vectors", "edges")}


def _nearest(latents: Tensor, rows: Tensor, count: int) -> Tensor:
    """(..., E), (V, E) -> (..., count): the nearest rows in order, the first among equals."""
    norms = rows.square().sum(dim=-1)

    def search(block: Tensor) -> Tensor:
        distance = norms - 2 * block @ rows.T  # |x|^2 is the same for all rows
        found = []
        for _ in range(count):  # topk has no rule for equals
            found.append(distance.argmin(dim=-1, keepdim=True))
            distance.scatter_(-1, found[-1], torch.inf)
        return torch.cat(found, dim=-1)

    return _by_blocks(search, latents, len(rows))


def _by_blocks(search: Callable[[Tensor], Tensor], latents: Tensor, entries: int) -> Tensor:
    step = max(SIMILARITY_BLOCK // entries, 1)
    flat = latents.flatten(0, -2)
    found = torch.cat([search(block) for block in flat.split(step)])
    return found.unflatten(0, latents.shape[:-1])
