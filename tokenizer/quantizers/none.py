"""No quantisation: a continuous autoencoder, plain or with a KL posterior (arXiv 2112.10752, section 3.1).

B batch, N visual tokens, C width of a latent.
"""

from typing import NoReturn

import torch
from torch import Tensor

from open_unitok.core.errors import UserError, did_you_mean

from .base import Quantizer, QuantizerOutput

POSTERIORS = ("none", "kl")
NO_CODES = (
    "This tokenizer has no codes (quantizer = 'none'): its latents are continuous. "
    "`unitok train` with stage: adapt makes a discrete one of it."
)


class NoQuantizer(Quantizer):
    """Latents of width `codebook_dim` pass unchanged; `num_codebooks` and `codebook_size` are not read.

    With posterior "kl" the tokenizer predicts mean and log variance of a Gaussian. Training decodes a sample,
    everything else the mean. Loss "kl": the divergence from N(0, 1), a sum over an image, a mean over images.

    Attributes:
        samples_posterior: whether training samples the latents.
        noise: (B, N, C) standard normal numbers of the next sample; None = from torch's global generator.
    """

    row_norm = "none"
    discrete = False
    no_codes = NO_CODES
    reads = False
    generates = False

    def __init__(
        self, num_codebooks: int, codebook_size: int, codebook_dim: int, posterior: str = "none"
    ) -> None:
        super().__init__([], codebook_dim)
        if posterior not in POSTERIORS:
            raise UserError(
                f"quantizer_options.posterior = {posterior!r}." + did_you_mean(str(posterior), POSTERIORS)
            )
        self.moments = self.samples_posterior = posterior == "kl"
        self.noise: Tensor | None = None

    def forward(self, latents: Tensor, entropy: bool = False) -> QuantizerOutput:
        """Pass (B, N, C) latents, or sample from (B, N, 2C) moments; there are no codes and no usage."""
        latents, losses = latents.float(), {}
        if self.moments:
            mean, log_variance = split_moments(latents)
            losses["kl"] = kl_divergence(mean, log_variance).mean()
            latents = sample_posterior(mean, log_variance, self.noise) if self.training else mean
        return QuantizerOutput(latents, None, losses, self.usage.new_zeros(0))

    @torch.no_grad()
    def quantise(self, latents: Tensor) -> Tensor:
        return latents.float()

    def encode(self, latents: Tensor) -> NoReturn:
        """
        Raises:
            UserError: always.
        """
        raise UserError(NO_CODES)

    def embed(self, codes: Tensor) -> NoReturn:
        """
        Raises:
            UserError: always.
        """
        raise UserError(NO_CODES)

    def split(self, latents: Tensor) -> Tensor:
        return latents.float().unflatten(-1, (1, -1))


def split_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    """(..., 2C) -> mean and log variance (..., C); the latter is clamped, as published."""
    mean, log_variance = moments.chunk(2, dim=-1)
    return mean, log_variance.clamp(-30.0, 20.0)


def sample_posterior(mean: Tensor, log_variance: Tensor, noise: Tensor | None = None) -> Tensor:
    """mean + deviation * noise; `noise` is standard normal, None = from torch's global generator."""
    if noise is None:
        noise = torch.randn_like(mean)
    return mean + (0.5 * log_variance).exp() * noise.to(mean)


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """(B, N, C) moments -> (B,), the divergence from N(0, 1) summed over an image."""
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).flatten(1).sum(dim=1)
