"""Vector quantisation by Euclidean distance whose rows are moving averages of sums and counts (VQ-VAE, arXiv
1711.00937, appendix A.1; as GaussianToken, 2501.15619, uses it).

B batch, N visual tokens, K codebooks, V entries per codebook, C width of one code, R = B*N latents.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from open_unitok.core.errors import UserError

from ..precision import exact_float32
from .base import Quantizer, QuantizerOutput, WriteRows, check_gradient, look_up, pass_through, places_before
from .kmeans import kmeans_by_distance
from .nearest import search_by_distance


class NearestEMAQuantizer(Quantizer):
    """The nearest entry in each of K codebooks, whose rows no optimiser moves.

    In training counts and sums of the latents of each row follow those of the global batch, and a row is the
    quotient of the two, with smoothed counts. A row of a count below `dead_below` becomes a random latent of
    the batch. Codes, output and loss are those of the rows before the step. In evaluation, and where the
    quantiser is frozen, nothing moves.

    Losses: "vq" = commitment * mse(latents, rows), latents to rows alone.

    Args:
        decay: of counts and sums.
        eps: added to each count before the counts are scaled back to their sum.
        gradient: see `pass_through`.

    Attributes:
        size, total: moving averages of the counts (K, V) and sums (K, V, C).
        started: whether k-means has set the rows; saved, so that no later run repeats it.
    """

    row_norm = "none"
    codebooks: nn.Parameter
    size: Tensor
    total: Tensor
    started: Tensor
    moves_rows, trains_rows = True, False

    def __init__(
        self,
        num_codebooks: int,
        codebook_size: int,
        codebook_dim: int,
        decay: float = 0.8,
        commitment: float = 0.25,
        eps: float = 1e-5,
        dead_below: float = 2.0,
        gradient: str = "rotation",
    ) -> None:
        super().__init__([codebook_size] * num_codebooks, num_codebooks * codebook_dim)
        if not 0 <= decay < 1:
            raise UserError(f"quantizer_options.decay is {decay}: it must be from 0 to below 1.")
        if dead_below < 0:
            raise UserError(f"quantizer_options.dead_below is {dead_below}: it must be 0 (never) or more.")
        if not eps > 0:  # a row without latents would be 0 / 0
            raise UserError(f"quantizer_options.eps is {eps}: it must be above 0.")
        self.decay, self.commitment, self.eps, self.dead_below = decay, commitment, eps, dead_below
        self.gradient = check_gradient(gradient)
        shape = (num_codebooks, codebook_size, codebook_dim)
        self.codebooks = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.register_buffer("size", torch.empty(shape[:2]))
        self.register_buffer("total", torch.empty(shape))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self._picks: Tensor | None = None
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        init.normal_(self.codebooks)
        init.ones_(self.size)
        if not self.codebooks.is_meta:  # a rank without weights gets rank 0's buffers
            init.copy_(self.total, self.codebooks.detach())
        init.zeros_(self.started)

    def start_step(self, generator: torch.Generator) -> None:
        # latents of the global batch by their number, modulo how many there are
        self._picks = torch.randint(2**62, self.size.shape, generator=generator)

    def forward(self, latents: Tensor, entropy: bool = False) -> QuantizerOutput:
        if entropy:
            raise UserError("quantizer 'nearest_ema' has no entropy loss: set losses.entropy to 0.")
        with exact_float32(latents.device):
            chunks = self.split(latents)
            codes = self._search(chunks)
            rows = look_up(codes, self.codebooks.float())
            losses = {"vq": self.commitment * F.mse_loss(chunks, rows)}
            quantised = pass_through(chunks, rows, self.gradient).flatten(-2)
            if self.training and not self.frozen:
                self.move_rows(*self._global_batch(chunks.detach(), codes), self._picks)
            return QuantizerOutput(quantised, codes, losses, self.track_usage(codes))

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        with exact_float32(latents.device):
            return self._search(self.split(latents))

    def embed(self, codes: Tensor) -> Tensor:
        return look_up(codes, self.codebooks.float()).flatten(-2)

    def split(self, latents: Tensor) -> Tensor:
        return latents.float().unflatten(-1, (len(self.code_sizes), -1))

    @torch.no_grad()
    def start_kmeans(self, latents: Tensor, indices: Tensor, iterations: int = 10) -> None:
        """Set rows, counts and sums by k-means on (R, latent_dim) latents; `indices` (K, V): the latents to
        begin with."""
        features = self.split(latents)
        for book, start in enumerate(indices):
            rows, counts = kmeans_by_distance(features[:, book], start, iterations)
            self.codebooks[book], self.size[book] = rows, counts
            self.total[book] = rows * counts[:, None]
        self.started.fill_(True)

    def reset_codes(self, unused: Tensor, rows: Tensor, write: WriteRows | None = None) -> None:
        """As `Quantizer.reset_codes`; the counts start again."""
        super().reset_codes(unused, rows, write)
        with torch.no_grad():
            size = max(self.dead_below, 1.0)
            self.size[unused] = size
            self.total[unused] = size * rows.to(self.total)

    @torch.no_grad()
    def move_rows(self, features: Tensor, codes: Tensor, picks: Tensor | None = None) -> None:
        """One step of the moving averages with all latents of a global batch.

        Args:
            features: (B, N, K, C); codes: (B, N, K) by the rows before the step.
            picks: (K, V) numbers of the latents, modulo R, that replace dead rows, in the order of the dead
                rows; None = random ones.
        """
        books, entries, width = self.codebooks.shape
        index = (codes + torch.arange(books, device=codes.device) * entries).flatten()
        sums = torch.zeros_like(self.total).view(-1, width).index_add_(0, index, features.reshape(-1, width))
        # not bincount: it has no meta kernel, on which the operations of a step are counted
        counts = torch.zeros_like(sums[:, 0]).index_add_(0, index, torch.ones_like(index, dtype=sums.dtype))
        self.size.mul_(self.decay).add_((1 - self.decay) * counts.view_as(self.size))
        self.total.mul_(self.decay).add_((1 - self.decay) * sums.view_as(self.total))
        all_counts = self.size.sum(dim=-1, keepdim=True)
        smoothed = (self.size + self.eps) / (all_counts + entries * self.eps) * all_counts
        rows = self.total / smoothed[..., None]
        # The n-th dead row of a book takes its n-th number: no shape depends on how many there are.
        dead = self.size < self.dead_below
        by_book = features.flatten(0, 1).transpose(0, 1)  # (K, R, C)
        picks = torch.randint(by_book.shape[1], dead.shape) if picks is None else picks
        place = (dead.cumsum(dim=-1) - 1).clamp(min=0)
        chosen = picks.to(dead.device).gather(-1, place) % by_book.shape[1]
        fresh = by_book.gather(1, chosen[..., None].expand(-1, -1, width))
        self.codebooks.copy_(torch.where(dead[..., None], fresh, rows))
        self.total.copy_(torch.where(dead[..., None], self.dead_below * fresh, self.total))
        self.size.masked_fill_(dead, self.dead_below)

    def _global_batch(self, features: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Features and codes of all processes, in the order of the global batch."""
        if self.order is not None and len(self.order) == len(features):
            back = places_before(tuple(self.order), features.device)
            features, codes = features[back], codes[back]
        if self.gather_over_ranks is not None:
            features, codes = (self.gather_over_ranks(x[None]).flatten(0, 1) for x in (features, codes))
        return features, codes

    @torch.no_grad()
    def _search(self, chunks: Tensor) -> Tensor:
        return search_by_distance(chunks, self.codebooks.float())
