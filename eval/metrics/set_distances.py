"""FD-DINOv2 (arXiv 2306.04675) and CMMD (arXiv 2401.09603): distances between two sets of images.

B images, N and M images of two sets, D features.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.tokenizer.frozen.dinov2 import DINOv2
from open_unitok.tokenizer.loading import find_weights, read_weights

from .inception_weights import Features

_DINOV2_FILES = ("dinov2_vitl14_pretrain.pth", "model.safetensors")  # the second: facebook/dinov2-large
_DINOV2_SOURCE = "https://github.com/facebookresearch/dinov2, or https://huggingface.co/facebook/dinov2-large"
_DINOV2_SIDE = 224
_NORMS = (
    "norm",
    "layernorm",
    "dinov2.layernorm",
)  # the last norm in the published and in transformers' layout
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_BANDWIDTH, _SCALE = 10.0, 1000.0


def find_dinov2_weights(path: str) -> Path:
    """The file of --dinov2-weights: a file, or the one in a folder."""
    return find_weights(path, _DINOV2_FILES, "DINOv2 (FD-DINOv2)", _DINOV2_SOURCE)


class Dinov2Extractor:
    """Class tokens after the last norm, of images squeezed to 224 x 224 by Pillow's bicubic (dgm-eval).

    Raises:
        UserError: the file is not a DINOv2.
    """

    def __init__(self, file: Path, device: str = "cpu"):
        self.net, self.device = DINOv2.from_file(file).to(device), device
        weights = read_weights(file)
        name = next((n for n in _NORMS if f"{n}.weight" in weights), None)
        if name is None:
            raise UserError(f"{file} has no last norm (norm.weight), which FD-DINOv2 needs.")
        self.norm = [weights[f"{name}.{part}"].to(device) for part in ("weight", "bias")]

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray]) -> Features:
        """uint8 (H, W, 3) images -> pooled (B, D)."""
        size = (_DINOV2_SIDE, _DINOV2_SIDE)
        resized = [np.asarray(Image.fromarray(i).resize(size, Image.Resampling.BICUBIC)) for i in images]
        pixels = torch.from_numpy(np.stack(resized)).to(self.device).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (_MEAN, _STD))
        tokens = self.net((pixels - mean) / std, [self.net.depth - 1])[-1][:, 0]
        return Features(F.layer_norm(tokens, tokens.shape[-1:], *self.norm, eps=1e-6).float().cpu().numpy())


def cmmd(x: np.ndarray, y: np.ndarray, rows: int = 2000) -> float:
    """1000 times the squared maximum mean discrepancy with a Gaussian kernel of bandwidth 10; biased.

    Args:
        x, y: (N, D) and (M, D) unit-length CLIP embeddings.
        rows: rows of a kernel matrix held in memory at a time.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    # biased: pairs of an image with itself count, as published
    kernel = _kernel_mean(x, x, rows) + _kernel_mean(y, y, rows) - 2 * _kernel_mean(x, y, rows)
    return float(_SCALE * kernel)


def _kernel_mean(x: np.ndarray, y: np.ndarray, rows: int) -> float:
    """The mean over all pairs of exp(-|x - y|^2 / (2 * bandwidth^2))."""
    total, squares = 0.0, (y**2).sum(axis=1)
    for start in range(0, len(x), rows):
        part = x[start : start + rows]
        distances = (part**2).sum(axis=1)[:, None] + squares - 2 * part @ y.T
        total += np.exp(-distances / (2 * _BANDWIDTH**2)).sum()
    return total / (len(x) * len(y))
