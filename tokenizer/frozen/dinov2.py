"""The frozen DINOv2 vision transformer whose intermediate features feed the discriminator (arXiv 2304.07193).

transformers' Dinov2Model cannot replace it: it resizes position embeddings to a target size, whereas the
published discriminator scales them by a factor with an offset of 0.1, which samples other points. With
Dinov2Model the golden logits differ by up to 0.11 and the norms of golden gradients by up to 3 %; on the
native grid, where nothing is resized, the two agree within 1e-5 (tested).

B batch, D width, N = rows*columns patches. Parameter names are those of the published weight file.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_unitok.core.errors import UserError

from ..loading import HELPER_HUB_ID, find_weights, load_exactly, read_weights

DINOV2_FILES = ("dinov2_vits14_pretrain.pth", "model.safetensors")  # the second: the layout of transformers
_NORM_EPS = 1e-6
_HEAD_WIDTH = 64  # of every published DINOv2; the file does not hold the number of heads
_UNUSED = ("mask_token",)  # in the file, but not used without masking
_NORM = ("norm.weight", "norm.bias")  # in the file, but not used by intermediate features


class DINOv2(nn.Module):
    """Frozen; differentiable with respect to the image only.

    Args:
        width, depth, heads: D, blocks and attention heads; ViT-S/14 has 384, 12 and 6.
        patch: side of a patch in pixels.
        grid: native grid side, the square of patches for which position embeddings were trained (37 patches =
            518 pixels).
        norm: hold the final norm, which `forward` does not apply.
    """

    def __init__(
        self,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        patch: int = 14,
        grid: int = 37,
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.width, self.depth, self.patch, self.grid = width, depth, patch, grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, stride=patch)})
        self.blocks = nn.ModuleList(DinoBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=_NORM_EPS) if norm else None
        self.requires_grad_(False)
        self.eval()

    def forward(self, image: Tensor, depths: Sequence[int]) -> list[Tensor]:
        """(B, 3, H, W) normalised image -> outputs (B, 1 + N, D) of the blocks `depths`, class token first.

        H and W are multiples of the patch size.
        """
        patches = self.patch_embed["proj"](image)
        rows, columns = patches.shape[-2:]
        hidden = torch.cat(
            (self.cls_token.expand(len(image), -1, -1), patches.flatten(2).transpose(1, 2)), dim=1
        )
        hidden = hidden + self._positions(rows, columns)
        outputs = []
        for depth, block in enumerate(self.blocks[: max(depths) + 1]):
            hidden = block(hidden)
            if depth in depths:
                outputs.append(hidden)
        return outputs

    def _positions(self, rows: int, columns: int) -> Tensor:
        """(1, 1 + N, D): the trained position embeddings, resized to this grid."""
        if (rows, columns) == (self.grid, self.grid):
            return self.pos_embed
        first, rest = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        square = rest.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        # The offset of 0.1 prevents the output size from being rounded down. DINOv2 was evaluated with
        # interpolation by this factor; interpolation to the size samples other points.
        factors = ((rows + 0.1) / self.grid, (columns + 0.1) / self.grid)
        resized = F.interpolate(square.float(), scale_factor=factors, mode="bicubic", antialias=False)
        assert resized.shape[-2:] == (rows, columns)
        return torch.cat((first, resized.flatten(2).transpose(1, 2).to(rest.dtype)), dim=1)

    @classmethod
    def from_file(cls, path: str | Path | None, heads: int | None = None, norm: bool = False) -> "DINOv2":
        """Load published weights from a file, a folder or a hub id; sizes are inferred from the tensors.

        Reads the original file and the layout of transformers (facebook/dinov2-small).

        Raises:
            UserError: the file is missing (the message names it and its source), or is not a DINOv2.
        """
        hub = f"https://huggingface.co/{HELPER_HUB_ID}"
        source = f"{hub}, or https://github.com/facebookresearch/dinov2 (ViT-S/14)"
        file = find_weights(path, DINOV2_FILES, "DINOv2 (the discriminator's features)", source)
        weights = read_weights(file)
        if any(name.endswith("embeddings.cls_token") for name in weights):
            weights = _from_transformers(weights)
        unused = _UNUSED if norm else (*_UNUSED, *_NORM)
        weights = {name: tensor for name, tensor in weights.items() if name not in unused}
        if not {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= weights.keys():
            raise UserError(f"{file} is not a DINOv2 vision transformer: it has no cls_token or pos_embed.")
        width = weights["cls_token"].shape[-1]
        model = cls(
            width=width,
            # number of distinct i in blocks.i.*
            depth=len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
            heads=heads or max(width // _HEAD_WIDTH, 1),
            patch=weights["patch_embed.proj.weight"].shape[-1],
            grid=native_grid_side(weights["pos_embed"].shape[1]),
            norm=norm,
        )
        load_exactly(model, weights, file)
        return model


def native_grid_side(num_positions: int) -> int:
    """Side of the square grid of trained positions; one position belongs to the class token."""
    return math.isqrt(num_positions - 1)


class _LayerScale(nn.Module):
    """One learned factor per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.gamma


class DinoBlock(nn.Module):
    """Pre-norm transformer block with layer scale; (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=_NORM_EPS)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.ls1 = _LayerScale(width)
        self.norm2 = nn.LayerNorm(width, eps=_NORM_EPS)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.ls2 = _LayerScale(width)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.ls1(self._attention(self.norm1(hidden)))
        return hidden + self.ls2(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(hidden)))))

    def _attention(self, hidden: Tensor) -> Tensor:
        parts = self.attn["qkv"](hidden).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.attn["proj"](mixed.transpose(1, 2).flatten(2))


# transformers' names inside a layer -> ours
_LAYER = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}


def _from_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' Dinov2Model state dict -> the original names; query, key and value become one tensor."""
    result = {}
    for name, tensor in weights.items():
        name = name.removeprefix("dinov2.")
        layer = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", name)
        if layer is None:
            result[_OUTSIDE.get(name, name)] = tensor
            continue
        block, part = f"blocks.{layer[1]}", layer[2]
        # query collects key and value too; their own entries are skipped below
        if inner := re.fullmatch(r"attention\.attention\.query\.(weight|bias)", part):
            names = (name.replace("query", word) for word in ("query", "key", "value"))
            parts = [weights.get(n, weights.get(f"dinov2.{n}")) for n in names]
            if any(p is None for p in parts):
                raise UserError(f"{name} has no matching key or value: this is not a DINOv2.")
            result[f"{block}.attn.qkv.{inner[1]}"] = torch.cat([p for p in parts if p is not None])
        elif not part.startswith("attention.attention."):
            stem, _, last = part.rpartition(".")
            ours = _LAYER.get(part) or f"{_LAYER.get(stem, stem)}.{last}"
            result[f"{block}.{ours}"] = tensor
    return result
