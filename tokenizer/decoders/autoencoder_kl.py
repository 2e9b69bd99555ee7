"""The decoder of an AutoencoderKL (arXiv 2112.10752, section 3.1): latents to pixels.

B batch, N visual tokens, C latent channels, (rows, columns) grid of visual tokens.
"""

from typing import Any

import torch
from torch import nn

from ..adaptation.autoencoder_kl import build_part
from ..config import UniTokConfig


class AutoencoderKLDecoder(nn.Module):
    """(B, N, C) latents, scaled as the encoder scales them -> (B, 3, rows*p, columns*p) pixels, not clamped.

    `decoder_options` are fields of diffusers' config: latent_channels, block_out_channels, ...
    """

    def __init__(self, config: UniTokConfig) -> None:
        super().__init__()
        part = build_part(config, "decoder")
        self.network: Any = part.network
        self.convolution = part.convolution
        self.patch_size, self.width = part.patch_size, part.width
        self.scale, self.shift = part.scale, part.shift

    @property
    def last_weight(self) -> torch.Tensor:
        """The last layer's weight; the adaptive GAN weight compares gradients there (VQGAN's rule)."""
        return self.network.conv_out.weight

    def forward(self, hidden: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        latents = hidden.transpose(1, 2).unflatten(2, grid) / self.scale + self.shift
        if self.convolution is not None:
            latents = self.convolution(latents)
        return self.network(latents)
