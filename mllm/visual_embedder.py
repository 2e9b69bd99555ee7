"""From the codes of an image to vectors that the decoder reads (arXiv 2502.20321, section 3.4).

I images, N visual tokens per image, K sub-codebooks, V entries per sub-codebook, C width of one code, D
decoder width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from open_unitok.core.errors import UserError
from open_unitok.tokenizer.projection import AttentionProjection, KVCache

from .config import UniTokMLLMConfig

PROJECTOR_EPS = 1e-6  # of the projector's norm; those of the projection keep torch's 1e-5


class VisualEmbedder(nn.Module):
    """Frozen unit-norm code rows -> causal attention projection, each image a sequence of its own -> MLP.

    Attributes:
        codebooks: (K, V, C) parameter without gradient; rows are normalised on use.
    """

    def __init__(self, config: UniTokMLLMConfig, width: int) -> None:
        super().__init__()
        middle = config.visual_hidden_size
        self.context = config.visual_context
        self.num_codebooks, self.codebook_size = (
            config.num_codebooks,
            config.codebook_size,
        )  # ZeRO-3 hides shapes
        shape = (config.num_codebooks, config.codebook_size, config.codebook_dim)
        self.codebooks = nn.Parameter(torch.randn(shape), requires_grad=False)
        self.projection = AttentionProjection(
            config.latent_dim, middle, config.num_projection_heads, causal=True
        )
        self.projector = nn.Sequential(
            nn.LayerNorm(middle, eps=PROJECTOR_EPS),
            nn.Linear(middle, width),
            nn.GELU(),
            nn.Linear(width, width),
        )

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """(I, N, K) codes of whole images -> (I, N, D), all at once."""
        return self.projector(self.projection(self.lookup(codes)))

    def step(self, codes: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        """The next codes (I, n, K) of images that are being drawn -> (I, n, D); `cache` from `new_cache`.

        With the "full" context the steps together equal one `forward`; with "last" each visual token stands
        alone.
        """
        if cache is None:
            return self.projector(self.projection(self.lookup(codes).flatten(0, 1).unsqueeze(1))).view(
                *codes.shape[:2], -1
            )
        return self.projector(self.projection(self.lookup(codes), cache))

    def new_cache(self, length: int) -> KVCache | None:
        """What `step` needs for images of up to `length` visual tokens; None with the "last" context."""
        return KVCache(length) if self.context == "full" else None

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        """(..., K) codes -> (..., K*C): the K unit-norm rows side by side."""
        offsets = torch.arange(self.num_codebooks, device=codes.device) * self.codebook_size
        rows = F.embedding(codes + offsets, self.codebooks.flatten(0, 1))
        return F.normalize(rows, dim=-1).flatten(-2)

    def check_codes(self, codes: torch.Tensor) -> None:
        """
        Raises:
            UserError: codes of another shape, kind or range than this embedder's.
        """
        books, entries = self.num_codebooks, self.codebook_size
        if codes.dim() != 3 or codes.shape[2] != books or codes.is_floating_point():
            raise UserError(
                f"image_codes have shape {tuple(codes.shape)} and dtype {codes.dtype}; integers of shape "
                f"(images, visual tokens, {books} sub-codebooks) are needed."
            )
        if codes.device.type == "cpu" and codes.numel():  # elsewhere the look would wait for the device
            low, high = torch.aminmax(codes)
            if low < 0 or high >= entries:
                raise UserError(f"image_codes run from {low} to {high}; 0 to {entries - 1} are allowed.")
