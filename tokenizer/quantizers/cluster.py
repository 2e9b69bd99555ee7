"""Online clustering of a frozen encoder's features (the cluster variant of arXiv 2411.04406, after CVQ-VAE,
arXiv 2307.15139): rows that are rarely used move to features of the batch.

B batch, N visual tokens, K codebooks, V entries per codebook, C width of one code, R = B*N rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from open_unitok.core.errors import UserError

from ..precision import exact_float32
from .base import (
    SIMILARITY_BLOCK,
    Quantizer,
    QuantizerOutput,
    check_gradient,
    look_up,
    pass_through,
    search_by_product,
)


class ClusterQuantizer(Quantizer):
    """The entry of largest cosine similarity in each of K codebooks; neither rows nor outputs are normalised.

    In training, before the output is looked up, each row becomes keep * row + (1 - keep) * anchor with
    keep = 1 - exp(-10 p V / (1 - decay) - eps), p the running frequency of the row, and the anchor the
    feature of the batch that is most similar to it. The rows also learn from the loss, by the optimiser.

    Losses: "vq" = mse(rows, latents), rows to latents, + commitment * mse(latents, rows), latents to rows.

    Args:
        gradient: None: the encoder is a frozen teacher, and the output has no path to it (VQ-KD); else it
            learns, see `pass_through` (CVQ-VAE, which averages the anchors of the processes).
        commitment: of an encoder that learns; .25 in CVQ-VAE.

    Attributes:
        probability: (K, V) running frequencies of the rows, saved.
    """

    row_norm = "none"
    codebooks: nn.Parameter
    probability: Tensor
    moves_rows = True

    def __init__(
        self,
        num_codebooks: int,
        codebook_size: int,
        codebook_dim: int,
        decay: float = 0.99,
        eps: float = 1e-3,
        gradient: str | None = None,
        commitment: float = 0.0,
    ) -> None:
        super().__init__([codebook_size] * num_codebooks, num_codebooks * codebook_dim)
        if not 0 <= decay < 1:
            raise UserError(f"quantizer_options.decay is {decay}: it must be from 0 to below 1.")
        self.decay, self.eps, self.commitment = decay, eps, commitment
        self.gradient = None if gradient is None else check_gradient(gradient)
        if commitment and gradient is None:
            raise UserError(
                "quantizer_options.commitment needs an encoder that learns: set gradient as well."
            )
        self.codebooks = nn.Parameter(torch.empty(num_codebooks, codebook_size, codebook_dim))
        self.register_buffer("probability", torch.zeros(num_codebooks, codebook_size))
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        bound = 1 / self.codebooks.shape[1]
        init.uniform_(self.codebooks, -bound, bound)
        init.zeros_(self.probability)

    def forward(self, latents: Tensor, entropy: bool = False) -> QuantizerOutput:
        if entropy:
            raise UserError("quantizer 'cluster' has no entropy loss: set losses.entropy to 0.")
        with exact_float32(latents.device):
            chunks = self.split(latents)
            features = chunks.detach()
            codes = self._search(features)
            if self.training and not self.frozen:
                self.move_rows(features, codes)
            rows = self._rows(codes)
            vq, quantised = F.mse_loss(rows, features), rows
            if self.gradient is not None:
                vq = vq + self.commitment * F.mse_loss(chunks, rows.detach())
                quantised = pass_through(chunks, rows, self.gradient)
            return QuantizerOutput(quantised.flatten(-2), codes, {"vq": vq}, self.track_usage(codes))

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        with exact_float32(latents.device):
            return self._search(self.split(latents))

    def embed(self, codes: Tensor) -> Tensor:
        return self._rows(codes).flatten(-2)

    def split(self, latents: Tensor) -> Tensor:
        return latents.float().unflatten(-1, (len(self.code_sizes), -1))

    @torch.no_grad()
    def move_rows(self, features: Tensor, codes: Tensor, anchors: Tensor | None = None) -> None:
        """Update frequencies and rows with the features (B, N, K, C) and codes (B, N, K) of a batch.

        Args:
            anchors: (K, V, C); None = the most similar feature of all processes.
        """
        books, entries, _ = self.codebooks.shape
        index = (codes + torch.arange(books, device=codes.device) * entries).flatten()
        # not bincount: it has no meta kernel, on which the operations of a step are counted
        count = torch.zeros_like(self.probability).view(-1)
        count.index_add_(0, index, torch.ones_like(index, dtype=count.dtype))
        frequency = count.view(books, entries) / (codes.shape[0] * codes.shape[1])
        if self.average_over_ranks is not None:
            frequency = self.average_over_ranks(frequency)
        self.probability.mul_(self.decay).add_((1 - self.decay) * frequency)
        keep = keep_share(self.probability, entries, self.decay, self.eps)[..., None]
        anchors = self._anchors(features) if anchors is None else anchors
        self.codebooks.copy_(keep * self.codebooks + (1 - keep) * anchors)

    def _anchors(self, features: Tensor) -> Tensor:
        """(K, V, C): per row the feature of largest cosine similarity to it, over all processes."""
        by_book = features.flatten(0, 1).transpose(0, 1)  # (K, R, C)
        found = []
        for rows, own in zip(F.normalize(self.codebooks.float(), dim=-1), by_book):
            unit = F.normalize(own, dim=-1)
            step = max(SIMILARITY_BLOCK // len(unit), 1)
            best = [(block @ unit.T).max(dim=-1) for block in rows.split(step)]
            similarity = torch.cat([values for values, _ in best])
            chosen = own[torch.cat([indices for _, indices in best])]
            if self.gather_over_ranks is not None:  # the best of the ranks' best, the first among equals
                every = self.gather_over_ranks(similarity[None])  # (ranks, V)
                candidates = self.gather_over_ranks(chosen[None])  # (ranks, V, C)
                chosen = candidates[every.argmax(dim=0), torch.arange(len(rows), device=rows.device)]
            found.append(chosen)
        return torch.stack(found)

    def _rows(self, codes: Tensor) -> Tensor:
        """(..., K) -> (..., K, C)."""
        return look_up(codes, self.codebooks.float())

    @torch.no_grad()
    def _search(self, features: Tensor) -> Tensor:
        """(B, N, K, C) -> (B, N, K): the entry of largest cosine similarity, the first among equals."""
        # the norm of a feature does not change which row is most similar
        return search_by_product(F.normalize(features, dim=-1), F.normalize(self.codebooks.float(), dim=-1))


def keep_share(probability: Tensor, entries: int, decay: float, eps: float) -> Tensor:
    """Share of itself that a row keeps in a step, by its running frequency."""
    return 1 - torch.exp(-probability * entries * 10 / (1 - decay) - eps)
