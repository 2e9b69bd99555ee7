"""Vector quantisation by moving averages (VQ-KD, arXiv 2411.04406): rows follow the latents assigned to them.

B batch, N visual tokens, K codebooks, V entries per codebook, C width of one code, R = B*N rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from open_unitok.core.errors import UserError

from ..precision import exact_float32
from .base import Quantizer, QuantizerOutput, check_gradient, look_up, pass_through, search_by_product
from .kmeans import kmeans


class EMAQuantizer(Quantizer):
    """The entry of largest cosine similarity in each of K codebooks, whose rows no optimiser moves.

    In training each row becomes unit(decay * row + (1 - decay) * unit(mean of its latents)); the size of a
    cluster plays no part, and rows without latents stay. Codes are those of the rows before the step; output
    and loss use the rows after it. In evaluation, and where the quantiser is frozen, nothing moves.

    Losses: "vq" = commitment * mse(latents, rows) on unit vectors, latents to rows alone.

    Attributes:
        started: whether k-means has set the rows; saved, so that no later run repeats it.
    """

    row_norm = "unit"
    codebooks: nn.Parameter
    started: Tensor
    moves_rows, trains_rows = True, False

    def __init__(
        self,
        num_codebooks: int,
        codebook_size: int,
        codebook_dim: int,
        decay: float = 0.99,
        commitment: float = 1.0,
        gradient: str = "straight_through",
    ) -> None:
        super().__init__([codebook_size] * num_codebooks, num_codebooks * codebook_dim)
        if not 0 <= decay < 1:
            raise UserError(f"quantizer_options.decay is {decay}: it must be from 0 to below 1.")
        self.decay, self.commitment, self.gradient = decay, commitment, check_gradient(gradient)
        rows = torch.empty(num_codebooks, codebook_size, codebook_dim)
        self.codebooks = nn.Parameter(rows, requires_grad=False)
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        init.normal_(self.codebooks)
        init.zeros_(self.started)

    def forward(self, latents: Tensor, entropy: bool = False) -> QuantizerOutput:
        if entropy:
            raise UserError("quantizer 'ema' has no entropy loss: set losses.entropy to 0.")
        with exact_float32(latents.device):
            features = self.split(latents)
            codes = self._search(features)
            if self.training and not self.frozen:
                self._move_rows(features.detach(), codes)
            rows = self._rows(codes)
            losses = {"vq": self.commitment * F.mse_loss(features, rows)}
            quantised = pass_through(features, rows, self.gradient).flatten(-2)
            return QuantizerOutput(quantised, codes, losses, self.track_usage(codes))

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        with exact_float32(latents.device):
            return self._search(self.split(latents))

    def embed(self, codes: Tensor) -> Tensor:
        return self._rows(codes).flatten(-2)

    def split(self, latents: Tensor) -> Tensor:
        """(..., K*C) -> (..., K, C), unit norm."""
        return F.normalize(latents.float().unflatten(-1, (len(self.code_sizes), -1)), dim=-1)

    @torch.no_grad()
    def start_kmeans(self, latents: Tensor, indices: Tensor, iterations: int = 10) -> None:
        """Set the rows by k-means on (R, latent_dim) latents; `indices` (K, V): the latents to begin with."""
        features = self.split(latents)
        for book, rows in enumerate(self.codebooks):
            rows.copy_(kmeans(features[:, book], rows, indices[book], iterations))
        self.started.fill_(True)

    def _rows(self, codes: Tensor) -> Tensor:
        """(..., K) -> (..., K, C), unit norm."""
        return F.normalize(look_up(codes, self.codebooks.float()), dim=-1)

    @torch.no_grad()
    def _search(self, features: Tensor) -> Tensor:
        """(B, N, K, C) -> (B, N, K): the entry of largest cosine similarity, the first among equals."""
        return search_by_product(features, F.normalize(self.codebooks.float(), dim=-1))

    @torch.no_grad()
    def _move_rows(self, features: Tensor, codes: Tensor) -> None:
        """One step of the moving average with the latents of all processes."""
        table = F.normalize(self.codebooks.float(), dim=-1)
        books, entries, width = table.shape
        index = (codes + torch.arange(books, device=codes.device) * entries).flatten()
        sums = torch.zeros_like(table).view(-1, width).index_add_(0, index, features.reshape(-1, width))
        # not bincount: it has no meta kernel, on which the operations of a step are counted
        counts = torch.zeros_like(sums[:, 0]).index_add_(0, index, torch.ones_like(index, dtype=sums.dtype))
        if self.average_over_ranks is not None:  # means over ranks: the factor cancels in the quotient
            sums, counts = self.average_over_ranks(sums), self.average_over_ranks(counts)
        found = (counts > 0).view(books, entries, 1)
        # the mean is made unit before it enters the average, and the row again after it
        mean = F.normalize(sums.view_as(table), dim=-1)
        target = torch.where(found, mean, table)
        self.codebooks.copy_(F.normalize(self.decay * table + (1 - self.decay) * target, dim=-1))
