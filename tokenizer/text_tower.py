"""The CLIP text tower (arXiv 2103.00020, section 2.4; arXiv 2502.20321, section 3.1).

B batch, T text positions, W text width, E width of the joint space.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from open_unitok.core.errors import UserError

from .config import UniTokConfig
from .layers import Attention, Linear, Recomputing


class TextBlock(nn.Module):
    """Pre-norm causal transformer block with an erf-GELU MLP; (B, T, W) -> (B, T, W)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal=True)
        self.norm2 = nn.LayerNorm(width)
        self.up = Linear(width, 4 * width)
        self.down = Linear(4 * width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attention(self.norm1(hidden))
        return hidden + self.down(F.gelu(self.up(self.norm2(hidden))))


class TextEncoder(Recomputing, nn.Module):
    """Token ids (B, T) -> (B, E), not normalised; pooled at the end of text, which has the largest id."""

    def __init__(self, config: UniTokConfig) -> None:
        super().__init__()
        width = config.text_hidden_size
        self.token_embedding = nn.Embedding(config.text_vocab_size, width)
        self.position_embedding = nn.Parameter(torch.zeros(config.text_context_length, width))
        self.blocks = nn.ModuleList(
            TextBlock(width, config.text_num_heads) for _ in range(config.text_num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.projection = Linear(width, config.embed_dim, bias=False)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """
        Raises:
            UserError: the captions are longer than text_context_length.
        """
        length, longest = token_ids.shape[1], self.position_embedding.shape[0]
        if length > longest:
            raise UserError(
                f"Captions of {length} token ids are longer than text_context_length = {longest}: truncate "
                "them (CaptionTokenizer does)."
            )
        hidden = self.token_embedding(token_ids) + self.position_embedding[:length]
        for block in self.blocks:
            hidden = self.call(block, hidden)
        # Pool at the end of text, the largest id of a row. Padding (id 0) follows it, and attention is
        # causal: padding does not change the result.
        rows = torch.arange(token_ids.shape[0], device=token_ids.device)
        return self.projection(self.norm(hidden[rows, token_ids.argmax(dim=-1)]))

    def init_weights(self) -> None:
        """CLIP's rule: width and depth set the scale (arXiv 2103.00020, section 2.4).

        Overwrites the values of `Linear.init_weights` in the blocks: children are initialised first.
        """
        width, depth = self.token_embedding.embedding_dim, len(self.blocks)
        init.normal_(self.token_embedding.weight, std=0.02)
        init.normal_(self.position_embedding, std=0.01)
        init.normal_(self.projection.weight, std=width**-0.5)
        # Layers that write to the residual stream shrink with the number of writes, 2 * depth.
        for block in self.blocks:
            assert isinstance(block, TextBlock)
            init.normal_(block.attention.qkv.weight, std=width**-0.5)
            init.normal_(block.attention.out.weight, std=width**-0.5 * (2 * depth) ** -0.5)
            init.normal_(block.up.weight, std=(2 * width) ** -0.5)
            init.normal_(block.down.weight, std=width**-0.5 * (2 * depth) ** -0.5)
