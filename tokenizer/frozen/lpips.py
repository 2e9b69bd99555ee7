"""LPIPS, the perceptual distance of two images on VGG16 features (arXiv 1801.03924, section 3).

B batch, H and W rows and columns. Module names are those of the published weight file.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..loading import HELPER_HUB_ID, find_weights, load_exactly, read_weights
from ..precision import exact_float32

LPIPS_FILE = "lpips_with_vgg.pth"
# The deepest feature maps of smaller images are 2 x 2 or less; the published training skips LPIPS for them.
MIN_SIZE = 48
# ImageNet's mean and standard deviation, for inputs in [-1, 1]
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_CHANNELS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # VGG16, up to relu5_3


class LPIPS(nn.Module):
    """Frozen; `lpips(a, b)` is differentiable with respect to the images, not the weights.

    Images are (B, 3, H, W) in [-1, 1], at least 16 pixels high and wide.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict()
        inputs = 3
        for number, widths in enumerate(_CHANNELS, 1):
            layers: list[nn.Module] = [] if number == 1 else [nn.MaxPool2d(2)]
            for width in widths:
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU(inplace=True)]
                inputs = width
            self.net[f"slice{number}"] = nn.Sequential(*layers)
        # Weight files name the linear heads model.1: model.0 was a dropout, here an identity.
        heads = (nn.Sequential(nn.Identity(), nn.Conv2d(w[-1], 1, 1, bias=False)) for w in _CHANNELS)
        self.lins = nn.ModuleList(nn.ModuleDict({"model": head}) for head in heads)
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """(B, 3, H, W) twice -> (B,) float32 distances; their mean is the published loss."""
        return self.by_layer(first, second).sum(dim=1)

    def by_layer(self, first: Tensor, second: Tensor) -> Tensor:
        """(B, 5): the contribution of each of the five layers."""
        distances = []
        a, b = (image.float() - self.shift for image in (first, second))
        a, b = a / self.scale, b / self.scale
        if a.is_cuda:  # as tensor cores read it: NCHW maps would be transposed in each layer
            a, b = (image.contiguous(memory_format=torch.channels_last) for image in (a, b))
        for block, head in zip(self.net.values(), self.lins):
            a, b = block(a), block(b)
            with exact_float32(a.device):  # differences of unit vectors need it
                weight = head["model"][1].weight.float()  # type: ignore[index]
                distances.append(layer_distance(a, b, weight))
        return torch.stack(distances, dim=1)

    @classmethod
    def from_file(cls, path: str | Path | None) -> "LPIPS":
        """Load the published weights; `path` is a file, a folder or a hub id.

        Raises:
            UserError: the file is missing (the message names it and its source), or is not LPIPS.
        """
        file = find_weights(
            path, (LPIPS_FILE,), "LPIPS (the perceptual loss)", f"https://huggingface.co/{HELPER_HUB_ID}"
        )
        weights = read_weights(file)
        model = cls()
        load_exactly(model, weights, file)
        return model.eval()

    def train(self, mode: bool = True) -> "LPIPS":
        return super().train(False)


def layer_distance(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """(B, C, H, W) features twice and a (1, C, 1, 1) head -> (B,): one layer's contribution."""
    return F.conv2d((_unit(a) - _unit(b)).square(), weight).mean(dim=(1, 2, 3))


def _unit(features: Tensor) -> Tensor:
    """Normalise over the channels in float32; both epsilons are the published ones."""
    features = features.float()
    length = (features.square().sum(dim=1, keepdim=True) + 1e-9).sqrt()
    return features / (length + 1e-10)
