"""The encoder of an AutoencoderKL (arXiv 2112.10752, section 3.1): pixels to the mode of its posterior.

B batch, N visual tokens, C latent channels.
"""

import torch
from torch import nn

from ..adaptation.autoencoder_kl import build_part
from ..config import UniTokConfig


class AutoencoderKLEncoder(nn.Module):
    """(B, 3, H, W) pixels in [-1, 1] -> (B, N, C) latents, shifted and scaled as the VAE's config says.

    `encoder_options` are fields of diffusers' config: latent_channels, block_out_channels, ...

    Attributes:
        samples_posterior: whether training takes a sample in place of the mode.
        noise: (B, N, C) standard normal numbers of the next sample; None = from torch's global generator.
    """

    def __init__(self, config: UniTokConfig) -> None:
        super().__init__()
        part = build_part(config, "encoder")
        self.network, self.convolution = part.network, part.convolution
        self.patch_size, self.width = part.patch_size, part.width
        self.scale, self.shift = part.scale, part.shift
        self.samples_posterior = False
        self.noise: torch.Tensor | None = None

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        moments = self.network(pixels)
        if self.convolution is not None:
            moments = self.convolution(moments)
        moments = moments.flatten(2).transpose(1, 2).float()  # (B, N, 2C)
        latents, log_variance = moments.chunk(2, dim=-1)
        if self.samples_posterior and self.training:
            noise = torch.randn_like(latents) if self.noise is None else self.noise.to(latents)
            # the published clamp
            latents = latents + (0.5 * log_variance.clamp(-30.0, 20.0)).exp() * noise
        return (latents - self.shift) * self.scale
