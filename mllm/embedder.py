"""From the codes of an image to vectors that the decoder reads (arXiv 2502.20321, section 3.4).

With `visual_positions` a learnt vector for each place of a visual token joins the MLP's normalised input,
which the published model has not: a small decoder hardly makes columns out of rotary attention. In the
shipped model, before it had them, a linear probe found the row of a visual token in 97 % of its states, its
half of the columns in 76 %.

I images, N visual tokens per image, K sub-codebooks, V entries per sub-codebook, C width of one code, D
decoder width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from open_unitok.errors import UserError
from open_unitok.tokenizer.projection import AttentionProjection, KeyValueCache

from .config import UniTokMLLMConfig

POSITION_STD = (
    0.5  # beside inputs of about 1: positions that begin near 0 stay there, since nothing reads them
)
PROJECTOR_EPS = 1e-6  # of the projector's norm; those of the projection keep torch's 1e-5


class VisualEmbedder(nn.Module):
    """Frozen unit-norm code rows -> causal attention projection, each image a sequence of its own -> MLP.

    Attributes:
        codebooks: (K, V, C) parameter without gradient; rows are normalised on use.
        positions: (num_image_tokens, visual_hidden_size) parameter, or None.
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
        self.positions: nn.Parameter | None = None
        if config.visual_positions:
            self.add_positions(config)

    def add_positions(self, config: UniTokMLLMConfig) -> None:
        """Learn a vector per place from now on."""
        self.num_positions = config.num_image_tokens
        drawn = torch.randn(self.num_positions, config.visual_hidden_size)
        self.positions = nn.Parameter(POSITION_STD * drawn)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """(I, N, K) codes of whole images -> (I, N, D), all at once."""
        return self._project(self.projection(self.lookup(codes)), 0)

    def step(
        self, codes: torch.Tensor, cache: KeyValueCache | None, place: int | torch.Tensor = 0
    ) -> torch.Tensor:
        """The next codes (I, n, K) of images that are being drawn -> (I, n, D); `cache` from `new_cache`,
        `place` the number of visual tokens before them.

        With the "full" context the steps together equal one `forward`; with "last" each visual token stands
        alone.
        """
        if cache is None:
            features = self.projection(self.lookup(codes).flatten(0, 1).unsqueeze(1))
            return self._project(features.view(*codes.shape[:2], -1), place)
        return self._project(self.projection(self.lookup(codes), cache), place)

    def _project(self, features: torch.Tensor, place: int | torch.Tensor) -> torch.Tensor:
        if self.positions is None:
            return self.projector(features)
        norm, first, gelu, second = self.projector
        places = torch.arange(features.shape[1], device=features.device) + place
        return second(gelu(first(norm(features) + F.embedding(places, self.positions))))

    def new_cache(self, length: int) -> KeyValueCache | None:
        """What `step` needs for images of up to `length` visual tokens; None with the "last" context."""
        return KeyValueCache(length) if self.context == "full" else None

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
        if self.positions is not None and codes.shape[1] > self.num_positions:
            raise UserError(
                f"An image has {codes.shape[1]} visual tokens, but this model has learnt positions for "
                f"{self.num_positions} (num_image_tokens)."
            )
        if codes.device.type == "cpu" and codes.numel():  # elsewhere the look would wait for the device
            low, high = torch.aminmax(codes)
            if low < 0 or high >= entries:
                raise UserError(f"image_codes run from {low} to {high}; 0 to {entries - 1} are allowed.")
